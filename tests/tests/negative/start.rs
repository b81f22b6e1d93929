//! VMs that cannot start: their files, their socket, or the host.

use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::process::{Command, Stdio};

use ballast_tests::{TestVm, ballast, payload, skip, wait_until};

use super::{Place, finish, program, skipped, unique, word, workers};

const MIB: u64 = 1 << 20;

fn put(file: &mut [u8], at: usize, bytes: &[u8]) {
    file[at..at + bytes.len()].copy_from_slice(bytes);
}

/// The first bytes of a vmlinux: its header, which promises a program header that is not there.
fn elf_header() -> Vec<u8> {
    let mut file = vec![0; 64];
    put(&mut file, 0, b"\x7fELF\x02\x01\x01");
    put(&mut file, 16, &2u16.to_le_bytes());
    put(&mut file, 18, &62u16.to_le_bytes());
    put(&mut file, 20, &1u32.to_le_bytes());
    put(&mut file, 32, &64u64.to_le_bytes());
    put(&mut file, 54, &56u16.to_le_bytes());
    put(&mut file, 56, &1u16.to_le_bytes());
    file
}

/// A bzImage of protocol 2.15 with 0x3000 bytes of kernel that needs 1 MiB at 16 MiB.
fn bzimage() -> Vec<u8> {
    let mut file = vec![0; 0x400 + 0x3000];
    file[0x1f1] = 1;
    put(&mut file, 0x1f4, &0x300u32.to_le_bytes());
    put(&mut file, 0x1fe, &[0x55, 0xaa]);
    file[0x201] = 0x6a;
    put(&mut file, 0x202, b"HdrS");
    put(&mut file, 0x206, &0x20fu16.to_le_bytes());
    file[0x211] = 1;
    put(&mut file, 0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(&mut file, 0x236, &1u16.to_le_bytes());
    put(&mut file, 0x238, &2047u32.to_le_bytes());
    put(&mut file, 0x258, &(16 * MIB).to_le_bytes());
    put(&mut file, 0x260, &(MIB as u32).to_le_bytes());
    file
}

#[test]
fn files_that_no_guest_can_be_made_of_are_named_with_what_is_wrong() {
    if skipped("bad-files") {
        return;
    }
    let place = Place::new();
    let payload = payload();
    let flat = std::fs::read(&payload).expect("the payload can be read");
    let mut wild_entry = flat.clone();
    put(&mut wild_entry, 8, &u32::MAX.to_le_bytes());
    let mut endless = flat.clone();
    put(&mut endless, 12, &u32::MAX.to_le_bytes());
    let mut wide = flat.clone();
    put(&mut wide, 12, &(256u32 << 20).to_le_bytes());
    let mut old = bzimage();
    put(&mut old, 0x206, &0x20bu16.to_le_bytes());
    let mut narrow = bzimage();
    put(&mut narrow, 0x236, &[0, 0]);

    let bz = place.file("bz", &bzimage());
    let small = place.file("small", b"070701");
    let empty = place.file("empty", b"");
    let large = place.file("large", b"");
    std::fs::File::options().write(true).open(&large).and_then(|f| f.set_len(100 * MIB)).expect("a sparse file");
    let pipe = place.path("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().expect("mkfifo is there").success());
    let (none, directory, socket) = (place.path("none"), place.path("dir"), place.path("listening"));
    std::fs::create_dir(&directory).expect("a directory can be made");
    let _listener = UnixListener::bind(&socket).expect("a socket can be made");

    let kernel = |name: &str, contents: &[u8]| place.file(name, contents);
    let table = [
        (none.clone(), None, "none cannot be opened (No such file"),
        (directory.clone(), None, "is not a file: give one with --kernel"),
        (pipe, None, "is not a file: give one with --kernel"),
        (socket, None, "give another file with --kernel"),
        ("/dev/zero".into(), None, "is not a file: give one with --kernel"),
        (empty.clone(), None, "the kernel file is empty; give a bzImage"),
        (kernel("script", b"#!/bin/sh\n"), None, "is a script; give a bzImage"),
        (kernel("text", b"hello\n"), None, "of an unknown kind"),
        (kernel("zeroes", &[0; 4096]), None, "give a bzImage"),
        (kernel("magic", b"\x7fELF"), None, "ends early"),
        (kernel("half-elf", &elf_header()[..40]), None, "its ELF header needs 64 bytes and the file has 40"),
        (kernel("elf", &elf_header()), None, "ends early"),
        (kernel("half-bz", &bzimage()[..0x1000]), None, "is it complete?"),
        (kernel("header-bz", &bzimage()[..0x240]), None, "is it complete?"),
        (kernel("old-bz", &old), None, "older than 2.12"),
        (kernel("bz-32", &narrow), None, "is it a 32-bit kernel?"),
        (kernel("half-flat", &flat[..12]), None, "its header needs 16 bytes"),
        (kernel("wild-flat", &wild_entry), None, "the kernel file is damaged"),
        (kernel("endless-flat", &endless), None, "above 3 GiB"),
        (kernel("wide-flat", &wide), None, "it needs guest RAM of at least 257 MiB and the guest has 64 MiB"),
        (bz.clone(), Some(none), "none cannot be opened (No such file"),
        (bz.clone(), Some(directory), "is not a file: give one with --initrd"),
        (bz.clone(), Some(empty), "the initial ramdisk is empty"),
        (bz, Some(large), "it needs guest RAM of at least"),
        (payload.clone(), Some(small), "leave it out"),
    ];
    for (kernel, initrd, part) in table {
        let name = unique("file");
        let mut command = place.run(&name, &["--memory", "size=64M,max=60M", "--kernel", word(&kernel)]);
        if let Some(initrd) = &initrd {
            command.arg("--initrd").arg(initrd);
        }
        finish(command).refused(125, part, &(&kernel, &initrd));
        place.is_untouched_by(&name, &kernel);
    }

    let name = unique("words");
    let mut long = place.run(&name, &["--memory", "size=64M", "--kernel", word(&payload), "--cmdline"]);
    long.arg("c".repeat(5000));
    finish(long).refused(125, "this guest takes 4095", &"a long command line");
    place.is_untouched_by(&name, &"a long command line");
}

#[test]
fn a_socket_of_a_living_vm_is_not_taken() {
    if skipped("socket-in-use") {
        return;
    }
    let mut first = TestVm::builder("first").memory("size=64M").cmdline("shell").start();
    first.expect("READY", 10);
    let name = unique("second");
    let words = ["run", "--name", &name, "--memory", "size=64M", "--kernel"];
    let mut second = program(&words);
    second.arg(payload()).arg("--socket").arg(first.socket());
    finish(second).refused(125, "in use by a running VM: choose another --name or --socket", &"a second VM");
    assert!(workers(&name).is_empty());
    assert_eq!(first.show()["state"], "running");
    assert!(first.command("echo still here", 10).contains("still here"));
}

#[test]
fn a_socket_of_a_killed_vm_is_replaced() {
    if skipped("stale-socket") {
        return;
    }
    let name = unique("stale");
    let mut first = TestVm::builder(&name).memory("size=64M,max=60M").cmdline("shell").start();
    first.expect("READY", 10);
    first.wait_state("running", 10);
    first.signal(libc::SIGKILL);
    first.wait(10);
    // It could not tidy up, but its worker has gone with it.
    wait_until("the worker is gone", 10, || workers(&name).is_empty().then_some(()));
    assert!(first.socket().exists());
    let directory = first.socket().with_extension("d");
    assert!(directory.exists());
    let said = finish({
        let mut show = program(&["show", &name, "--socket"]);
        show.arg(first.socket());
        show
    });
    said.refused(1, "and its VM has ended with it; `ballast run` starts it again", &"show");

    let words = ["run", "--name", &name, "--memory", "size=64M,max=60M", "--debug-port", "--cmdline", "exit 7"];
    let mut second = program(&words);
    second.arg("--kernel").arg(payload()).arg("--socket").arg(first.socket());
    let said = finish(second);
    assert_eq!((said.status, said.err.as_str()), (Some(7), ""), "{said:?}");
    assert!(!first.socket().exists() && !directory.exists(), "now it is tidy");
}

/// Semantics: 9.
#[test]
fn sockets_that_cannot_be_made_are_refused_and_what_is_in_the_way_stays() {
    if skipped("bad-sockets") {
        return;
    }
    let place = Place::new();
    let file = place.file("web.sock", b"mine");
    let below_file = place.path("web.sock/sub/x.sock");
    let beside_file = place.path("vm.sock");
    place.file("vm.d", b"mine too");
    // Directories that are not for this user alone, and one with somebody's file in the worker's place.
    let (beside_open, beside_link, beside_worker) =
        (place.path("open.sock"), place.path("link.sock"), place.path("own.sock"));
    let open = std::fs::DirBuilder::new().mode(0o755).create(place.path("open.d"));
    open.and_then(|()| std::os::unix::fs::symlink(place.path("own.d"), place.path("link.d"))).expect("can be made");
    std::fs::DirBuilder::new().mode(0o700).create(place.path("own.d")).expect("can be made");
    place.file("own.d/worker", b"mine three");
    let foreign = place.path("other.sock");
    let link = place.path("pointer.sock");
    std::os::unix::fs::symlink(&file, &link).expect("a link can be made");
    let long = place.path(&"d".repeat(60)).join("s".repeat(60));
    // 107 bytes hold the control socket, but not the worker's, which is longer by a few.
    let nearly = place.path("");
    let nearly = nearly.join("s".repeat(107 - nearly.as_os_str().len()));
    let before = std::fs::read_dir(place.path("")).expect("ours").count();
    for (socket, part) in [
        (&file, "is not a socket: choose another --socket"),
        (&link, "is not a socket: choose another --socket"),
        (&below_file, "cannot be made"),
        (&beside_file, "vm.d is in the way"),
        (&beside_open, "open.d is in the way"),
        (&beside_link, "link.d is in the way"),
        (&beside_worker, "worker cannot be made"),
        (&long, "at most 107 are possible: choose a shorter --socket"),
        (&nearly, "at most 107 are possible: choose a shorter --socket"),
        (&"/proc/none/x.sock".into(), "choose another --socket"),
        (&"/proc/x.sock".into(), "choose another --socket"),
    ] {
        let name = unique("socket");
        let mut command = program(&["run", "--name", &name, "--memory", "size=64M", "--kernel"]);
        command.arg(payload()).arg("--socket").arg(socket);
        finish(command).refused(125, part, socket);
        assert!(workers(&name).is_empty(), "{socket:?}");
    }
    assert!(!foreign.exists() && !beside_file.exists());
    assert_eq!(std::fs::read_dir(place.path("")).expect("ours").count(), before, "something was left");
    assert_eq!(std::fs::read(&file).expect("still there"), b"mine");
    assert_eq!(std::fs::read(place.path("own.d/worker")).expect("still there"), b"mine three");
    let mode = std::fs::metadata(place.path("open.d")).expect("still there").permissions().mode();
    assert_eq!(mode & 0o777, 0o755, "not ours to change");
    assert_eq!(std::fs::read(place.path("vm.d")).expect("still there"), b"mine too");
}

/// Why a host cannot be imitated here, if so: it takes a mount namespace, hence root.
fn no_namespace() -> Option<&'static str> {
    // SAFETY: geteuid has no conditions.
    if unsafe { libc::geteuid() } != 0 {
        return Some("not-root");
    }
    let made = Command::new("unshare").args(["-m", "--propagation", "private", "true"]).stderr(Stdio::null()).status();
    if made.is_ok_and(|status| status.success()) { None } else { Some("no-mount-namespaces") }
}

/// In a mount namespace of its own, over a `/dev` of its own that `$1` fills, without root's right to open
/// everything, runs the rest of its arguments. This machine's devices are not touched.
const ANOTHER_DEV: &str = "\
    mount -t tmpfs -o mode=755 tmpfs /dev && mknod -m 666 /dev/null c 1 3 && eval \"$1\" && shift && \
    exec setpriv --bounding-set=-dac_override,-dac_read_search -- \"$@\"";

#[test]
fn a_host_that_cannot_run_vms_is_refused_with_the_command_that_fixes_it() {
    if let Some(reason) = no_namespace() {
        skip("bad-hosts", reason);
        return;
    }
    let place = Place::new();
    let kernel = place.file("kernel", b"BALLAST1");
    let kvm = "mknod -m 600 /dev/kvm c 10 232";
    for (devices, limited, part) in [
        (":", false, "there is no /dev/kvm: enable virtualization"),
        ("mknod -m 000 /dev/kvm c 10 232", false, "no permission to open /dev/kvm: sudo usermod -aG kvm $USER"),
        ("mknod -m 600 /dev/kvm c 1 3", false, "/dev/kvm is not KVM"),
        ("echo x > /dev/kvm", false, "/dev/kvm is not KVM"),
        ("mkdir /dev/kvm", false, "modprobe kvm_intel"),
        ("KVM", true, "there is no /dev/userfaultfd: run a kernel with CONFIG_USERFAULTFD=y"),
        ("KVM && mknod -m 000 /dev/userfaultfd c 10 257", true, "/etc/udev/rules.d/60-ballast.rules"),
        ("KVM && mknod -m 600 /dev/userfaultfd c 1 3", true, "/dev/userfaultfd gives no userfaultfd"),
    ] {
        if limited && skipped(part) {
            continue;
        }
        let devices = devices.replace("KVM", kvm);
        let memory = if limited { "size=64M,max=32M" } else { "size=64M" };
        let in_it = |words: &[&str]| {
            let mut command = Command::new("unshare");
            command.args(["-m", "--propagation", "private", "sh", "-c", ANOTHER_DEV, "sh", &devices]);
            command.arg(ballast()).args(words).stdin(Stdio::null());
            finish(command)
        };
        let name = unique("host");
        let socket = place.path("sockets");
        std::fs::create_dir_all(&socket).expect("a directory can be made");
        std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o700)).expect("ours");
        let words = ["run", "--name", &name, "--memory", memory, "--kernel", word(&kernel), "--socket", word(&socket)];
        in_it(&words).refused(125, part, &devices);
        place.is_untouched_by(&name, &devices);
        if devices == kvm {
            // And a directory in which one may not make anything.
            std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o500)).expect("ours");
            let words = [&words[..4], &["size=64M"], &words[5..]].concat();
            in_it(&words).refused(125, "cannot be made (Permission denied", &devices);
            place.is_untouched_by(&name, &devices);
        }
        let doctor = in_it(&["doctor"]);
        assert_eq!(doctor.status, Some(1), "{doctor:?}");
        assert!(doctor.out.contains("FAIL") && doctor.out.contains("do this:"), "{doctor:?}");
    }
}
