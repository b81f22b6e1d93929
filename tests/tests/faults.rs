//! Faults: whatever fails around a VM costs that VM at most, and nobody else.
//!
//! Two others are elsewhere. A kernel without PSI is in `shortage.rs`, with the small host that it needs. A clock that is set is played to the
//! pure policy, which gets time as a parameter (`memcg-core/tests/core/clock.rs`), and to the story of a VM
//! (`vmm/src/controller/why/tests.rs`): the program itself has no other clock than the kernel's monotonic one, which cannot be set
//! and does not run while the host sleeps, and the wall clock's time is in events and decisions for people only.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;

use ballast_tests::serve::{Console, Serve, is_alive, kill, pid};
use ballast_tests::{PAGE, number, pagemap, payload, resident_pages, skip, skipped, swap_or_skip, wait_until};
use rustix::fs::FallocateFlags;
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

/// A charged guest of 128 MiB that waits for words, and its console.
fn guest(serve: &Serve, name: &str, more: &Value) -> (u32, Console) {
    let mut config = json!({
        "kernel": payload(), "cmdline": "shell", "debug_port": true,
        "memory": { "size_bytes": 128 * MIB, "track": true },
    });
    for (key, value) in more.as_object().expect("an object") {
        match (&mut config[key], value) {
            (Value::Object(there), Value::Object(more)) => there.extend(more.clone()),
            (there, value) => *there = value.clone(),
        }
    }
    let view = serve.create_with(name, &config);
    let console = Console::of(&view);
    console.expect("READY", 20);
    (pid(&view), console)
}

/// A group with a limit.
fn group(serve: &Serve, path: &str, max: u64) {
    let (status, answer) = serve.ask("PUT", &format!("/groups{path}"), Some(&json!({ "max_bytes": max })));
    assert_eq!(status, 201, "{answer}");
}

/// The next controller in the place of one that is killed.
fn killed(serve: &mut Serve) {
    serve.signal(libc::SIGKILL);
    serve.wait(10);
}

/// What is charged is what is there.
fn sound(serve: &Serve) {
    wait_until("all invariants hold", 20, || {
        let (status, view) = serve.ask("GET", "/check", None);
        assert_eq!(status, 200, "{view}");
        (view["ok"] == true).then_some(())
    });
}

/// A process that does not die, whatever it is sent, until it is let go: the kernel's freezer has it.
struct Frozen(PathBuf);

impl Frozen {
    /// `None`, with the reason printed, where there is no such freezer: that of cgroup v2 lets a process die.
    fn take(test: &str, pid: u32) -> Option<Self> {
        let directory = PathBuf::from(format!("/sys/fs/cgroup/freezer/{test}-{pid}"));
        let refused = |error: std::io::Error| skip(test, format!("no-freezer-of-cgroup-v1 ({error})"));
        fs::create_dir(&directory).map_err(refused).ok()?;
        let frozen = Self(directory);
        fs::write(frozen.0.join("cgroup.procs"), pid.to_string()).map_err(refused).ok()?;
        fs::write(frozen.0.join("freezer.state"), "FROZEN").map_err(refused).ok()?;
        wait_until("it is frozen", 10, || {
            (fs::read_to_string(frozen.0.join("freezer.state")).expect("a state").trim() == "FROZEN").then_some(())
        });
        Some(frozen)
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        let _ = fs::write(self.0.join("freezer.state"), "THAWED");
        // As soon as nobody is in it.
        for pid in fs::read_to_string(self.0.join("cgroup.procs")).unwrap_or_default().lines() {
            let _ = fs::write("/sys/fs/cgroup/freezer/cgroup.procs", pid);
        }
        let _ = fs::remove_dir(&self.0);
    }
}

/// The one who was chosen dies, however long that takes, and nobody dies in its place.
#[test]
fn a_controller_that_dies_while_its_victim_does_kills_nobody_else() {
    if skipped("faults-dying") {
        return;
    }
    let mut serve = Serve::start(&[]);
    group(&serve, "/full", 72 * MIB);
    let of = |preference: &str, priority: u32| {
        json!({
            "group": "/full", "memory": { "swap_max_bytes": 0 },
            "oom": { "action": "kill", "preference": preference, "priority": priority },
        })
    };
    let mut big = guest(&serve, "big", &of("none", 0));
    let mut spare = guest(&serve, "spare", &of("none", 5));
    let mut asks = guest(&serve, "asks", &of("none", 9));
    big.1.ok("touch 16M 24M seed=1");
    spare.1.ok("touch 16M 12M seed=2");
    let frozen = Frozen::take("faults-dying", big.0);
    asks.1.send("touch 16M 30M seed=3");
    let victim = wait_until("somebody is chosen", 30, || serve.told("victim_selected").pop());
    assert_eq!((&victim["vm"], &victim["action"]), (&json!("big"), &json!("kill")), "{victim}");
    killed(&mut serve);
    assert!(frozen.is_none() || is_alive(big.0), "it is dying still");
    serve.again();
    if frozen.is_some() {
        let told = serve.told("not_adopted").pop().expect("it is there");
        assert_eq!((&told["vm"], &told["reason"]), (&json!("big"), &json!("it is ending")), "{told}");
        sound(&serve);
    }
    drop(frozen);
    wait_until("it is gone", 20, || (!is_alive(big.0)).then_some(()));
    asks.1.expect("OK touch", 30);
    assert_eq!(serve.show("big")["end"], "it was killed: its group ran short of memory");
    assert_eq!(serve.told("killed").pop().expect("told")["by"], "group");
    assert_eq!(serve.told("victim_selected"), Vec::<Value>::new(), "one was enough");
    assert!(is_alive(spare.0) && is_alive(asks.0));
    spare.1.ok("verify 16M 12M seed=2");
    asks.1.ok("verify 16M 30M seed=3");
    sound(&serve);
}

/// A worker that cannot be asked is charged what is seen at it, and for what it may hold beside that nobody has to go.
#[test]
fn nobody_goes_for_memory_that_a_silent_worker_may_only_have() {
    if skipped("faults-silent") {
        return;
    }
    let mut serve = Serve::start(&[]);
    group(&serve, "/full", 96 * MIB);
    let config = json!({ "group": "/full", "memory": { "swap_max_bytes": 0 }, "oom": { "action": "kill", "deadline_ms": 1000 } });
    let mut silent = guest(&serve, "silent", &config);
    let mut asks = guest(&serve, "asks", &config);
    silent.1.ok("touch 16M 24M seed=1");
    asks.1.ok("touch 16M 10M seed=2");
    let charged = number(&serve.show("silent"), "memory.current_bytes");
    kill(silent.0, libc::SIGSTOP);
    killed(&mut serve);
    serve.again();
    // It was charged with all that a guest of 128 MiB could have.
    asks.1.ok("touch 26M 20M seed=3");
    let (_, host) = serve.ask("GET", "/host", None);
    let stray = &host["strays"][0];
    assert_eq!(
        (&stray["name"], &stray["group"], &stray["why"]),
        (&json!("silent"), &json!("/full"), &json!("it says nothing"))
    );
    let assumed = number(stray, "charged_bytes");
    assert!(assumed >= charged && assumed < charged + 32 * MIB, "{assumed} for {charged}");
    let (_, check) = serve.ask("GET", "/check", None);
    let said = format!("silent: its worker {} could not be taken over: it says nothing", silent.0);
    assert!(check["ok"] == false && check.to_string().contains(&said), "{check}");
    let (status, why) = serve.ask("GET", "/vms/silent/why", None);
    assert!(
        status == 409 && why["message"].as_str().is_some_and(|words| words.contains("could not be taken over")),
        "{why}"
    );
    // There is room for this, if it has no more than is seen.
    asks.1.send("touch 46M 26M seed=4");
    let told = wait_until("nobody is chosen", 60, || serve.told("nobody_chosen").pop());
    assert!(
        told["why"].as_str().is_some_and(|why| why.starts_with("the worker of \"silent\" cannot be asked")),
        "{told}"
    );
    assert!(is_alive(silent.0) && is_alive(asks.0));
    kill(silent.0, libc::SIGCONT);
    asks.1.expect("OK touch", 30);
    assert_eq!(serve.told("victim_selected"), Vec::<Value>::new());
    silent.1.ok("verify 16M 24M seed=1");
    for verify in ["verify 16M 10M seed=2", "verify 26M 20M seed=3", "verify 46M 26M seed=4"] {
        asks.1.ok(verify);
    }
    sound(&serve);
}

/// One that is paused for others stays so through the end of the controller, though its worker has not heard of it yet.
#[test]
fn a_controller_that_dies_before_its_victim_has_heard_chooses_nobody_else() {
    if !skipped("faults-unheard") {
        dies_while_its_victim_is_emptied(false);
    }
}

/// The same while its worker is half empty.
#[test]
fn a_controller_that_dies_while_its_victim_is_emptied_chooses_nobody_else() {
    if !skipped("faults-emptied") {
        dies_while_its_victim_is_emptied(true);
    }
}

/// Nobody else is chosen when the victim's pause is cut off by the end of the controller, when it has just been decided or when
/// `half` of its memory is evicted; and it goes on by itself when there is room.
fn dies_while_its_victim_is_emptied(half: bool) {
    let mut serve = Serve::start(&[]);
    group(&serve, "/full", 128 * MIB);
    let of = |swap: Value, priority: u32| {
        json!({
            "group": "/full", "memory": { "swap_max_bytes": swap }, "oom": { "priority": priority, "deadline_ms": 1500 },
        })
    };
    let mut big = guest(&serve, "big", &of(Value::Null, 0));
    let mut spare = guest(&serve, "spare", &of(Value::Null, 5));
    let mut asks = guest(&serve, "asks", &of(json!(0), 9));
    big.1.ok("touch 16M 72M seed=1 fill=half");
    spare.1.ok("touch 16M 8M seed=2");
    // While it stands still nothing can be had of it, and so it is chosen.
    kill(big.0, libc::SIGSTOP);
    asks.1.send("touch 16M 60M seed=3");
    let victim = wait_until("somebody is chosen", 30, || serve.told("victim_selected").pop());
    assert_eq!((&victim["vm"], &victim["action"]), (&json!("big"), &json!("pause")), "{victim}");
    let before = serve.show("big");
    let left = || resident_pages(&before) * PAGE;
    if half {
        kill(big.0, libc::SIGCONT);
        wait_until("some of it is evicted", 20, || (left() < 60 * MIB).then_some(()));
        kill(big.0, libc::SIGSTOP);
    }
    killed(&mut serve);
    assert!(left() > 8 * MIB, "it is not over");
    kill(big.0, libc::SIGCONT);
    serve.again();
    let now = serve.show("big");
    assert_eq!((&now["state"], &now["paused_by"]), (&json!("paused"), &json!("group")), "{now}");
    asks.1.expect("OK touch", 30);
    assert_eq!(serve.told("victim_selected"), Vec::<Value>::new(), "one was enough");
    assert_eq!(serve.show("big")["state"], "paused");
    spare.1.ok("verify 16M 8M seed=2");
    asks.1.ok("verify 16M 60M seed=3");
    sound(&serve);
    serve.ask("POST", "/vms/asks/kill", None);
    wait_until("it goes on", 30, || (serve.show("big")["state"] == "running").then_some(()));
    big.1.ok("verify 16M 72M seed=1 fill=half");
    sound(&serve);
}

/// Signals that a process may ignore: a worker does, and ends all the same when its VM is to.
#[test]
fn a_worker_that_ignores_signals_ends_in_time_and_alone() {
    if skipped("faults-deaf") {
        return;
    }
    let serve = Serve::start(&[]);
    let mut guests = ["stopped", "killed", "removed", "other"].map(|name| guest(&serve, name, &json!({})));
    for (worker, console) in &mut guests {
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT] {
            kill(*worker, signal);
        }
        console.ok("touch 16M 8M seed=1");
    }
    // Now they do nothing at all.
    guests[..3].iter().for_each(|(worker, _)| kill(*worker, libc::SIGSTOP));
    let (status, stopped) = serve.ask("POST", "/vms/stopped/stop?timeout_ms=300", None);
    assert_eq!((status, &stopped["killed"]), (200, &json!(true)), "{stopped}");
    let (status, killed) = serve.ask("POST", "/vms/killed/kill", None);
    assert_eq!((status, &killed["state"]), (200, &json!("ended")), "{killed}");
    assert_eq!(serve.ask("DELETE", "/vms/removed", None).0, 204);
    assert_eq!(guests.each_ref().map(|(worker, _)| is_alive(*worker)), [false, false, false, true]);
    guests[3].1.ok("verify 16M 8M seed=1");
    sound(&serve);
}

/// A page of a VM's store or file is not what was written: the guest that asks for it is ended, says so, and nobody else is.
#[test]
fn a_damaged_store_is_found_out_and_ends_its_vm_alone() {
    let Some(directory) = swap_or_skip("faults-store") else { return };
    let serve = Serve::start(&[]);
    let limited = json!({ "max_bytes": 40 * MIB });
    let mut other = guest(&serve, "other", &json!({ "memory": limited, "swap_dir": directory.path() }));
    other.1.ok("touch 16M 48M seed=1 fill=mixed");
    for (name, fill) in [("memory", "half"), ("file", "full")] {
        let mut guest = guest(&serve, name, &json!({ "memory": limited, "swap_dir": directory.path() }));
        guest.1.ok(&format!("touch 16M 64M seed=2 fill={fill}"));
        let view = serve.show(name);
        // It is at work until it meets a page that is damaged.
        guest.1.send("hot 16M 64M passes=100000");
        if name == "file" {
            assert!(number(&view, "cold.file_bytes") > 16 * MIB, "{view}");
            damage_file(guest.0);
        } else {
            assert!(number(&view, "memory.stat.store_bytes") > 4 * MIB, "{view}");
            damage_store(&view);
        }
        let ended = serve.wait_state(name, "ended");
        let end = ended["end"].as_str().expect("how");
        assert!(end.starts_with("guest memory is lost: the store is damaged at place 0x"), "{end}");
        let told = serve.told("worker_died").pop().expect("told");
        assert_eq!((&told["vm"], &told["reason"]), (&json!(name), &json!(end)), "{told}");
    }
    other.1.ok("verify 16M 48M seed=1 fill=mixed");
    assert!(is_alive(other.0));
    sound(&serve);
}

/// The file of a worker that takes evicted pages: it has no name.
fn swap_file(worker: u32) -> File {
    let descriptors = fs::read_dir(format!("/proc/{worker}/fd")).expect("descriptors").flatten();
    let file = descriptors.map(|entry| entry.path()).find(|path| {
        let place = fs::read_link(path).unwrap_or_default();
        place.to_string_lossy().contains("/#")
    });
    let file = file.expect("it has a swap file");
    OpenOptions::new().read(true).write(true).open(file).expect("ours")
}

/// Flips a bit in each page of a worker's file.
fn damage_file(worker: u32) {
    let file = swap_file(worker);
    let length = file.metadata().expect("a file").len();
    for at in (0..length).step_by(PAGE as usize) {
        let mut byte = [0];
        file.read_exact_at(&mut byte, at + 77).expect("read");
        file.write_all_at(&[byte[0] ^ 1], at + 77).expect("written");
    }
    file.sync_all().expect("on the disk");
}

/// Flips a bit in each cache line of what a worker keeps in memory of evicted pages, until it has found out.
fn damage_store(view: &Value) {
    let (start, bytes) = (number(view, "store.hva"), number(view, "store.bytes"));
    let memory = OpenOptions::new().read(true).write(true).open(format!("/proc/{}/mem", number(view, "pid")));
    let memory = memory.expect("ours");
    let here = pagemap(view, start, bytes).into_iter().zip((start..).step_by(PAGE as usize));
    let damage = |at| {
        let mut page = vec![0; PAGE as usize];
        memory.read_exact_at(&mut page, at)?;
        page.iter_mut().step_by(64).for_each(|byte| *byte ^= 0x10);
        memory.write_all_at(&page, at)
    };
    let damaged = here.filter(|(entry, _)| entry >> 63 == 1).take_while(|(_, at)| damage(*at).is_ok()).count();
    assert!(damaged > 0);
}

/// A disk that is as small as it has to be: a file with a file system. This thread and what it starts see it.
struct Disk {
    place: tempfile::TempDir,
}

impl Disk {
    fn mount_or_skip(test: &str, mib: u64) -> Option<Self> {
        if skipped(test) {
            return None;
        }
        Self::mount(mib).map_err(|error| skip(test, format!("no-disk-can-be-made-here ({error})"))).ok()
    }

    fn mount(mib: u64) -> std::io::Result<Self> {
        let place = tempfile::tempdir()?;
        let (image, directory) = (place.path().join("image"), place.path().join("disk"));
        fs::create_dir(&directory)?;
        let (none, recursive) = (std::ptr::null(), libc::MS_REC | libc::MS_PRIVATE);
        // SAFETY: all strings are NUL-terminated; no data is passed.
        let done = unsafe {
            libc::unshare(libc::CLONE_NEWNS) == 0 && libc::mount(none, c"/".as_ptr(), none, recursive, none.cast()) == 0
        };
        if !done {
            return Err(std::io::Error::last_os_error());
        }
        let run = |command: &mut Command| {
            let output = command.output()?;
            let failed = || std::io::Error::other(String::from_utf8_lossy(&output.stderr).into_owned());
            output.status.success().then_some(()).ok_or_else(failed)
        };
        run(Command::new("mkfs.ext4").args(["-q", "-m", "0"]).arg(&image).arg(format!("{mib}M")))?;
        run(Command::new("mount").args(["-o", "loop"]).args([&image, &directory]))?;
        Ok(Self { place })
    }

    fn directory(&self) -> PathBuf {
        self.place.path().join("disk")
    }

    /// Takes all of it.
    fn fill(&self) {
        let mut file = File::create(self.directory().join("full")).expect("made");
        let full = std::io::copy(&mut std::io::repeat(1), &mut file).expect_err("no end");
        assert_eq!(full.raw_os_error(), Some(libc::ENOSPC));
    }

    /// Gives back what was taken.
    fn free(&self) {
        fs::remove_file(self.directory().join("full")).expect("removed");
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(self.directory()).status();
    }
}

/// A disk that is full where it had promised room (a thin one, or one that copies on write): a pause frees what it can, nothing is
/// lost, and the rest goes when there is room again.
#[test]
fn a_disk_that_is_full_while_a_vm_is_paused_loses_nothing() {
    let Some(disk) = Disk::mount_or_skip("faults-disk", 112) else { return };
    let serve = Serve::start(&[]);
    group(&serve, "/full", 128 * MIB);
    let of = |swap: Value, preference: &str| {
        json!({
            "group": "/full", "memory": { "swap_max_bytes": swap },
            "oom": { "deadline_ms": 500, "preference": preference },
        })
    };
    let mut config = of(json!(80 * MIB), "none");
    config["swap_dir"] = json!(disk.directory());
    let mut big = guest(&serve, "big", &config);
    let mut asks = guest(&serve, "asks", &of(json!(0), "omit"));
    big.1.ok("touch 16M 64M seed=1 fill=full");
    let file = swap_file(big.0);
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(&file, punch, 0, 80 * MIB).expect("a file system with holes");
    drop(file);
    disk.fill();
    asks.1.send("touch 16M 64M seed=3");
    let victim = wait_until("somebody is chosen", 30, || serve.told("victim_selected").pop());
    assert_eq!((&victim["vm"], &victim["action"]), (&json!("big"), &json!("pause")), "{victim}");
    let failed = serve.told("swap_failed").pop().expect("the disk is full");
    assert_eq!(failed["vm"], "big", "{failed}");
    let decision = || serve.ask("GET", "/oom/log", None).1["decisions"][0].clone();
    let over = |decision: &Value| decision["outcome"] != "under_way";
    let vain = wait_until("nothing comes", 20, || Some(decision()).filter(over));
    // Whether it was at the end of its tries when it was looked at is chance.
    assert!(vain["outcome"] == "nothing" || vain["outcome"] == "late", "{vain}");
    assert_eq!(number(&vain, "freed_bytes"), 0, "{vain}");
    wait_until("there is nobody else", 20, || serve.told("nobody_chosen").pop());
    let why = String::from_utf8(serve.verb(&["why", "big"]).stdout).expect("text");
    assert!(why.contains("its swap file could not be written, as on a full disk"), "{why}");
    assert!(is_alive(big.0) && is_alive(asks.0));
    sound(&serve);
    disk.free();
    asks.1.expect("OK touch", 30);
    wait_until("the rest is evicted", 20, || (decision()["outcome"] == "freed").then_some(()));
    asks.1.ok("verify 16M 64M seed=3");
    serve.ask("POST", "/vms/asks/kill", None);
    wait_until("it goes on", 30, || (serve.show("big")["state"] == "running").then_some(()));
    big.1.ok("verify 16M 64M seed=1 fill=full");
    sound(&serve);
    drop(serve);
    drop(disk);
}
