"""The OpenAPI document against a public validator, and a generated client against `ballast serve`.

usage: round_trip.py DIRECTORY PAYLOAD, where DIRECTORY/s is the socket; run by scripts/openapi.
"""

import importlib
import json
import pathlib
import subprocess
import sys
import time

import httpx
from openapi_spec_validator import validate

work, payload = pathlib.Path(sys.argv[1]), sys.argv[2]
socket = str(work / "s")
MIB = 1 << 20


def transport():
    return httpx.HTTPTransport(uds=socket)


def document():
    """The served document, as soon as the controller answers."""
    end = time.monotonic() + 20
    while True:
        try:
            with httpx.Client(transport=transport(), base_url="http://ballast") as http:
                return http.get("/openapi.json").raise_for_status().json()
        except httpx.TransportError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


served = document()
validate(served)
(work / "openapi.json").write_text(json.dumps(served))
operations = [operation for item in served["paths"].values() for operation in item.values()]

generate = [sys.executable, "-m", "openapi_python_client", "generate", "--meta", "none"]
generate += ["--path", str(work / "openapi.json"), "--output-path", str(work / "client")]
made = subprocess.run(generate, capture_output=True, text=True)
assert made.returncode == 0, made.stdout + made.stderr
sys.path.insert(0, str(work))
client = importlib.import_module("client")
models = importlib.import_module("client.models")


def call(name):
    """The function for an operation."""
    return importlib.import_module(f"client.api.default.{name}").sync_detailed


for operation in operations:
    call(operation["operationId"])

requests = 0


def expect(status, name, *arguments, **keywords):
    """Makes a request, checks its status, and returns what the client has made of the body."""
    global requests
    requests += 1
    answer = call(name)(*arguments, client=connection, **keywords)
    assert answer.status_code == status, f"{name}: {answer.status_code} instead of {status}: {answer.content}"
    return answer.parsed


with client.Client(base_url="http://ballast", httpx_args={"transport": transport()}) as connection:
    host = expect(200, "get_host")
    assert host.version == served["info"]["version"], host
    memory = models.MemoryConfig(size_bytes=64 * MIB, max_bytes=48 * MIB)
    config = models.VmConfig(kernel=payload, cmdline="shell", debug_port=True, memory=memory)
    made = expect(201, "put_vms_by_name", "web", body=config)
    assert (made.name, made.state, made.memory.max_bytes) == ("web", models.VmState.RUNNING, 48 * MIB), made
    assert expect(200, "put_vms_by_name", "web", body=config).pid == made.pid
    assert [vm.name for vm in expect(200, "get_vms")] == ["web"]
    patch = models.MemoryPatch(max_bytes=40 * MIB)
    changed = expect(200, "patch_vms_by_name_memory", "web", body=patch, generation=made.generation)
    assert changed.memory.max_bytes == 40 * MIB and changed.generation > made.generation, changed
    refused = expect(409, "patch_vms_by_name_memory", "web", body=patch, generation=made.generation)
    assert (refused.code, refused.generation) == (models.Code.GENERATION_MISMATCH, changed.generation), refused
    unlimited = expect(200, "patch_vms_by_name_memory", "web", body=models.MemoryPatch(max_bytes=None))
    assert unlimited.memory.max_bytes is None, unlimited
    assert expect(200, "post_vms_by_name_pause", "web").state == models.VmState.PAUSED
    assert expect(200, "post_vms_by_name_resume", "web").state == models.VmState.RUNNING
    expect(204, "delete_vms_by_name", "web")
    assert expect(404, "get_vms_by_name", "web").code == models.Code.NOT_FOUND

print(f"OPENAPI valid operations={len(operations)} client=openapi-python-client requests={requests} PASS")
