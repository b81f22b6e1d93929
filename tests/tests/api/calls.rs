//! The requests of the contract, in the order in which they are made: each route with success and in vain.

/// What must come of a request.
#[derive(Clone, Copy, Debug)]
pub enum Expect {
    /// It is done, with this status. For requests that change nothing.
    Done(u16),
    /// It is done, and asked for again it has this second status and changes nothing more.
    Twice(u16, u16),
    /// It is refused with this status and code.
    Refused(u16, &'static str),
}

/// A request.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    /// Method and path as the document has them.
    pub route: &'static str,
    /// Path and query that are asked.
    pub target: &'static str,
    /// The body; `KERNEL` in it is the path of the payload.
    pub body: &'static str,
    /// What must come of it.
    pub expect: Expect,
}

impl Call {
    /// Whether it is made in vain.
    pub fn refused(&self) -> bool {
        matches!(self.expect, Expect::Refused(..))
    }
}

const fn call(route: &'static str, target: &'static str, body: &'static str, expect: Expect) -> Call {
    Call { route, target, body, expect }
}

use Expect::{Done, Refused, Twice};

const WEB: &str = r#"{"kernel":"KERNEL","cmdline":"shell","debug_port":true,"cpus":1,"balloon":{"deflate_on_oom":true},
    "oom":{"action":"pause"},"memory":{"size_bytes":67108864,"max_bytes":50331648,"swap_max_bytes":null}}"#;
const OTHER: &str = r#"{"kernel":"KERNEL","cmdline":"shell","debug_port":true,"memory":{"size_bytes":134217728}}"#;
const RELATIVE: &str = r#"{"kernel":"payload.bin","memory":{"size_bytes":67108864}}"#;
const MEMORY: &str = "PATCH /vms/{name}/memory";
const ANSWER: &str = "POST /oom/decisions/{id}";
const GROUP_RECLAIM: &str = "POST /groups/{path}/reclaim";

/// Routes whose success needs more than a request before it; tests of their own show it.
pub const ELSEWHERE: &[&str] = &[ANSWER];

/// All of them. A route of the document without a line of each kind fails the test.
pub const CALLS: &[Call] = &[
    call("GET /host", "/host", "", Done(200)),
    call("GET /host", "/host?frob=1", "", Refused(400, "bad_request")),
    call("PUT /vms/{name}", "/vms/web", WEB, Twice(201, 200)),
    call("PUT /vms/{name}", "/vms/web", OTHER, Refused(409, "already_exists")),
    call("PUT /vms/{name}", "/vms/db", RELATIVE, Refused(400, "bad_request")),
    call("PUT /vms/{name}", "/vms/%F0%9F%90%8B", WEB, Refused(400, "bad_request")),
    call("PUT /vms/{name}", "/vms/..%2F..%2Fweb", WEB, Refused(400, "bad_request")),
    call("GET /vms", "/vms", "", Done(200)),
    call("GET /vms", "/vms?name=web", "", Refused(400, "bad_request")),
    call("GET /vms/{name}", "/vms/web", "", Done(200)),
    call("GET /vms/{name}", "/vms/%77%65%62", "", Done(200)),
    call("GET /vms/{name}", "/vms/db", "", Refused(404, "not_found")),
    call("GET /vms/{name}", "/vms/w%C3%A9b", "", Refused(404, "not_found")),
    call("GET /vms/{name}", "/vms/%ff", "", Refused(400, "bad_request")),
    call("GET /vms/{name}/why", "/vms/web/why", "", Done(200)),
    call("GET /vms/{name}/why", "/vms/db/why", "", Refused(404, "not_found")),
    call("GET /vms/{name}/console", "/vms/web/console", "", Done(200)),
    call("GET /vms/{name}/console", "/vms/db/console", "", Refused(404, "not_found")),
    call(MEMORY, "/vms/web/memory", r#"{"max_bytes":46137344}"#, Twice(200, 200)),
    call(MEMORY, "/vms/web/memory?mode=refuse&wait_ms=0", r#"{"max_bytes":null,"low_bytes":4096}"#, Twice(200, 200)),
    call(MEMORY, "/vms/web/memory?mode=force", r#"{"max_bytes":50331648}"#, Twice(200, 200)),
    call(MEMORY, "/vms/web/memory?mode=refuse", r#"{"max_bytes":4096}"#, Refused(409, "limit_below_usage")),
    call(MEMORY, "/vms/web/memory?generation=999999", "{}", Refused(409, "generation_mismatch")),
    call(MEMORY, "/vms/web/memory", r#"{"max_bytes":1}"#, Refused(400, "invalid_limit")),
    call(MEMORY, "/vms/web/memory", r#"{"min_bytes":67108864}"#, Refused(400, "invalid_limit")),
    call(MEMORY, "/vms/db/memory", "{}", Refused(404, "not_found")),
    call("POST /vms/{name}/pause", "/vms/web/pause", "", Twice(200, 200)),
    call("POST /vms/{name}/pause", "/vms/db/pause", "", Refused(404, "not_found")),
    call("POST /vms/{name}/resume", "/vms/web/resume", "", Twice(200, 200)),
    call("POST /vms/{name}/resume", "/vms/db/resume", "", Refused(404, "not_found")),
    call("POST /vms/{name}/move", "/vms/web/move", r#"{"group":"/"}"#, Twice(200, 200)),
    call("POST /vms/{name}/move", "/vms/web/move", r#"{"group":"/gold"}"#, Refused(409, "no_such_group")),
    call("POST /vms/{name}/move", "/vms/web/move", r#"{"group":"gold"}"#, Refused(400, "bad_request")),
    call("POST /limits", "/limits", r#"[{"vm":"web","limits":{"max_bytes":48234496}}]"#, Twice(200, 200)),
    call(
        "POST /limits",
        "/limits?mode=refuse",
        r#"[{"vm":"web","limits":{}},{"vm":"db","limits":{}}]"#,
        Refused(404, "not_found"),
    ),
    call("POST /limits", "/limits", "[]", Refused(400, "bad_request")),
    call("POST /limits", "/limits", r#"[{"vm":"web","limits":[]}]"#, Refused(400, "bad_request")),
    call("POST /limits", "/limits", r#"[["web",null,{}]]"#, Refused(400, "bad_request")),
    call("POST /limits", "/limits", "{}", Refused(400, "bad_request")),
    call("POST /vms/{name}/reclaim", "/vms/web/reclaim?bytes=0&wait_ms=1000", "", Twice(200, 200)),
    call("POST /vms/{name}/reclaim", "/vms/web/reclaim", "", Refused(400, "bad_request")),
    call("POST /vms/{name}/reclaim", "/vms/web/reclaim?bytes=-1", "", Refused(400, "bad_request")),
    call("POST /vms/{name}/reclaim", "/vms/web/reclaim?bytes=1&wait_ms=99999999999", "", Refused(400, "bad_request")),
    call("POST /vms/{name}/reclaim", "/vms/db/reclaim?bytes=4096", "", Refused(404, "not_found")),
    call("POST /vms/{name}/kill", "/vms/web/kill", "", Twice(200, 200)),
    call("POST /vms/{name}/kill", "/vms/db/kill", "", Refused(404, "not_found")),
    call("POST /vms/{name}/start", "/vms/web/start", "", Twice(201, 200)),
    call("POST /vms/{name}/start", "/vms/db/start", "", Refused(404, "not_found")),
    call("POST /vms/{name}/stop", "/vms/web/stop?timeout_ms=60000", "", Twice(200, 200)),
    call("POST /vms/{name}/stop", "/vms/web/stop?timeout_ms=-1", "", Refused(400, "bad_request")),
    call("POST /vms/{name}/stop", "/vms/db/stop", "", Refused(404, "not_found")),
    call("POST /vms/{name}/pause", "/vms/web/pause", "", Refused(409, "wrong_state")),
    call(MEMORY, "/vms/web/memory", "{}", Refused(409, "wrong_state")),
    call("POST /vms/{name}/stop", "/vms/web/stop?timeout_ms=0", "", Twice(200, 200)),
    call("GET /metrics", "/metrics", "", Done(200)),
    call("GET /metrics", "/metrics?vm=web", "", Refused(400, "bad_request")),
    call("GET /check", "/check", "", Done(200)),
    call("GET /check", "/check?frob=1", "", Refused(400, "bad_request")),
    call("GET /overview", "/overview", "", Done(200)),
    call("GET /overview", "/overview?frob=1", "", Refused(400, "bad_request")),
    call("GET /oom/rank", "/oom/rank", "", Done(200)),
    call("GET /oom/rank", "/oom/rank?frob=1", "", Refused(400, "bad_request")),
    call("GET /oom/log", "/oom/log?since=7", "", Done(200)),
    call("GET /oom/log", "/oom/log?since=-1", "", Refused(400, "bad_request")),
    call("PUT /groups/{path}", "/groups/gold", r#"{"max_bytes":268435456,"high_bytes":null}"#, Twice(201, 200)),
    call("PUT /groups/{path}", "/groups/gold/apps", "{}", Twice(201, 200)),
    call("PUT /groups/{path}", "/groups/gold%2Fbatch", r#"{"min_bytes":4096}"#, Twice(201, 200)),
    call("PUT /groups/{path}", "/groups/none/apps", "{}", Refused(409, "no_such_group")),
    call("PUT /groups/{path}", "/groups/gold%2F..%2Fx", "{}", Refused(400, "bad_request")),
    call("PUT /groups/{path}", "/groups/gold", r#"{"max_bytes":1}"#, Refused(400, "invalid_limit")),
    call("GET /groups", "/groups", "", Done(200)),
    call("GET /groups", "/groups?path=gold", "", Refused(400, "bad_request")),
    call("GET /groups/{path}", "/groups/gold/apps", "", Done(200)),
    call("GET /groups/{path}", "/groups/", "", Done(200)),
    call("GET /groups/{path}", "/groups/?frob=1", "", Refused(400, "bad_request")),
    call("GET /groups/{path}", "/groups/silver", "", Refused(404, "not_found")),
    call("PATCH /groups/{path}", "/groups/gold", r#"{"max_bytes":134217728}"#, Twice(200, 200)),
    call("PATCH /groups/{path}", "/groups/?wait_ms=100", r#"{"max_bytes":null}"#, Twice(200, 200)),
    call("PATCH /groups/{path}", "/groups/gold?generation=999999", "{}", Refused(409, "generation_mismatch")),
    call("PATCH /groups/{path}", "/groups/silver", "{}", Refused(404, "not_found")),
    call("POST /groups/{path}/move", "/groups/gold/batch/move", r#"{"parent":"/gold"}"#, Twice(200, 200)),
    call("POST /groups/{path}/move", "/groups/gold/move", r#"{"parent":"/gold/batch"}"#, Refused(409, "wrong_state")),
    call(GROUP_RECLAIM, "/groups/gold/reclaim?bytes=0&wait_ms=1000", "", Twice(200, 200)),
    call(GROUP_RECLAIM, "/groups/gold%2Fbatch/reclaim", "", Refused(400, "bad_request")),
    call(GROUP_RECLAIM, "/groups/gold/reclaim?bytes=1&wait_ms=99999999999", "", Refused(400, "bad_request")),
    call(GROUP_RECLAIM, "/groups/silver/reclaim?bytes=4096", "", Refused(404, "not_found")),
    call("DELETE /groups/{path}", "/groups/gold", "", Refused(409, "not_empty")),
    call("DELETE /groups/{path}", "/groups/gold/apps", "", Twice(204, 404)),
    call("GET /events", "/events?since=0&follow=false", "", Done(200)),
    call("GET /events", "/events?since=18446744073709551615&follow=false", "", Done(200)),
    call("GET /events", "/events?since=-1", "", Refused(400, "bad_request")),
    call("PUT /oom/policy", "/oom/policy", r#"{"wait_ms":2000,"follow":false}"#, Twice(200, 200)),
    call("PUT /oom/policy", "/oom/policy", r#"{"wait_ms":99}"#, Refused(400, "bad_request")),
    call("PUT /oom/policy", "/oom/policy", "{}", Refused(400, "bad_request")),
    call(ANSWER, "/oom/decisions/7", r#"{"answer":"kill","vm":"web"}"#, Refused(404, "not_found")),
    call(ANSWER, "/oom/decisions/-7", r#"{"answer":"raise"}"#, Refused(400, "bad_request")),
    call(ANSWER, "/oom/decisions/7", r#"{"answer":"shoot"}"#, Refused(400, "bad_request")),
    call("DELETE /vms/{name}", "/vms/web", "", Twice(204, 404)),
    call("DELETE /vms/{name}", "/vms/db", "", Refused(404, "not_found")),
];
