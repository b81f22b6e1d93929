use super::*;

fn config(cpus: u32) -> Box<VmConfig> {
    let text = format!(r#"{{"kernel": "/k", "cpus": {cpus}, "memory": {{"size_bytes": 268435456}}}}"#);
    serde_json::from_str(&text).expect("understood")
}

fn made(vm: &str, cpus: u32) -> Entry {
    Entry::Made { vm: vm.to_owned(), group: "/".to_owned(), instance: 7, accounting: true, config: config(cpus) }
}

fn limits(vm: &str, max: u64, generation: u64) -> NodeLimits {
    let limits = LimitPatch::max(Limit::Pages(Pages(max))).apply(Limits::default());
    NodeLimits { node: vm.to_owned(), generation, limits: limits.into() }
}

/// A life in which everything happens that is remembered.
fn history() -> Vec<Entry> {
    let of = |vm: &str| vm.to_owned();
    let unlimited = LimitsInBytes::from(Limits::default());
    vec![
        Entry::Group { path: of("/gold"), accounting: false, limits: unlimited },
        Entry::Group { path: of("/gold/web"), accounting: false, limits: unlimited },
        Entry::Group { path: of("/away"), accounting: true, limits: unlimited },
        made("web", 1),
        made("db", 2),
        Entry::Limits { nodes: vec![limits("web", 100, 1), limits("db", 200, 1)] },
        Entry::Limits { nodes: vec![limits("/", 900, 1), limits("/gold", 800, 2)] },
        Entry::GroupGone { path: of("/away") },
        Entry::Paused { vm: of("web"), by: PausedBy::User },
        Entry::Limits { nodes: vec![limits("web", 300, 2)] },
        Entry::Paused { vm: of("db"), by: PausedBy::Policy },
        Entry::Paused { vm: of("db"), by: PausedBy::User },
        Entry::Resumed { vm: of("db") },
        made("kept", 1),
        Entry::Paused { vm: of("kept"), by: PausedBy::Host },
        Entry::Paused { vm: of("kept"), by: PausedBy::User },
        made("taken-back", 1),
        Entry::Paused { vm: of("taken-back"), by: PausedBy::Host },
        Entry::Paused { vm: of("taken-back"), by: PausedBy::User },
        Entry::Paused { vm: of("taken-back"), by: PausedBy::Host },
        made("old", 1),
        Entry::Killed { vm: of("old"), by: KilledBy::Request },
        Entry::Ended { vm: of("old"), how: "it was killed on request".to_owned() },
        made("gone", 1),
        Entry::Gone { vm: of("gone") },
    ]
}

#[test]
fn what_was_appended_is_what_the_next_controller_knows() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("journal");
    let (first, mut journal) = Journal::open(&path).expect("begun");
    assert_eq!((first.epoch, first.vms().count(), journal.epoch()), (1, 0, 1));
    for entry in history() {
        journal.prepare().expect("room");
        journal.append(entry).expect("written");
    }
    drop(journal);
    let (second, journal) = Journal::open(&path).expect("read");
    assert_eq!((second.epoch, journal.epoch()), (2, 2));
    let vms: Vec<_> = second.vms().collect();
    assert_eq!(vms.iter().map(|vm| vm.name.as_str()).collect::<Vec<_>>(), ["web", "db", "kept", "taken-back", "old"]);
    assert_eq!(vms[0].limits.map(|(generation, limits)| (generation, limits.max)), Some((2, Some(300 * 4096))));
    let paused: Vec<_> = vms.iter().take(4).map(|vm| (vm.paused, vm.kept_paused)).collect();
    let (user, host) = (Some(PausedBy::User), Some(PausedBy::Host));
    assert_eq!(paused, [(user, false), (None, false), (host, true), (host, false)]);
    assert_eq!((vms[0].config.cpus, vms[1].config.cpus), (1, 2));
    assert_eq!((vms[4].killed, vms[0].killed), (Some(KilledBy::Request), None));
    assert_eq!(vms[4].ended.as_deref(), Some("it was killed on request"));
    let groups: Vec<_> = second.groups().map(|(path, at)| (path, at.accounting, at.limits.max)).collect();
    let expected = [("/", true, Some(900 * 4096)), ("/gold", true, Some(800 * 4096)), ("/gold/web", false, None)];
    assert_eq!(groups, expected);
    drop(journal);
    // Compacted, it says the same, in fewer words.
    let (third, _) = Journal::open(&path).expect("read");
    assert_eq!(third.vms().collect::<Vec<_>>(), vms);
    assert_eq!(third.groups().collect::<Vec<_>>(), second.groups().collect::<Vec<_>>());
    assert_eq!(third.epoch, 3);
    Journal::remove_if_empty(&path);
    assert!(path.exists(), "it has something to say");
    assert_eq!(std::fs::read_dir(dir.path()).expect("there").count(), 1, "nothing is left beside it");
}

#[test]
fn limits_come_back_as_they_were() {
    let patch = LimitPatch {
        min: Some(Limit::Pages(Pages(1))),
        high: Some(Limit::Pages(Pages(30))),
        max: Some(Limit::Pages(Pages(40))),
        vmm_max: Some(Limit::Pages(Pages(5))),
        ..LimitPatch::default()
    };
    let limits = patch.apply(Limits::default());
    assert_eq!(LimitPatch::from(LimitsInBytes::from(limits)).apply(Limits::default()), limits);
    assert_eq!(LimitPatch::from(LimitsInBytes::from(Limits::default())).apply(limits), Limits::default());
}

/// Whoever wrote a line that has no end was told nothing, and told nobody.
#[test]
fn a_last_line_without_its_end_is_not_there_wherever_it_was_cut() {
    let text = lines(&[&[Entry::Life { format: FORMAT, epoch: 3 }], history().as_slice()].concat());
    let ends: Vec<_> = (0..text.len()).filter(|at| text[*at] == b'\n').collect();
    for cut in 0..=text.len() {
        let whole = ends.iter().filter(|end| **end < cut).count();
        let remembered = Remembered::replay(&text[..cut]).unwrap_or_else(|error| panic!("{cut}: {error:?}"));
        let mut expected = Remembered::default();
        let history = [vec![Entry::Life { format: FORMAT, epoch: 3 }], history()].concat();
        for entry in history.into_iter().take(whole) {
            expected.apply(entry).expect("good");
        }
        assert_eq!(remembered, expected, "{cut}");
    }
}

#[test]
fn a_line_that_is_not_understood_refuses_the_start_and_nothing_is_lost() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("journal");
    let life = r#"{"life":{"format":1,"epoch":1}}"#;
    for (text, line) in [
        ("garbage\n".to_owned(), 1),
        ("\0\0\0\0\n".to_owned(), 1),
        (r#"{"resumed":{"vm":"web"}}"#.to_owned() + "\n", 1),
        (format!("{life}\n{{\"frob\":{{}}}}\n"), 2),
        (format!("{life}\n{{\"gone\":{{\"vm\":\"a\",\"why\":1}}}}\n"), 2),
        (format!("{life}\n\n{{\"resumed\":{{\"vm\":\"web\"}}}}\n"), 3),
        (format!("{life}\n{life}\n"), 2),
        (format!("{life}\n{{\"gone\":{{\"vm\":\"a\"}}}}x\n{life}"), 2),
    ] {
        std::fs::write(&path, &text).expect("written");
        let error = Journal::open(&path).err().unwrap_or_else(|| panic!("{text}")).to_string();
        assert!(error.starts_with(&format!("line {line} of ")) && error.contains("ballast rm NAME"), "{text}: {error}");
        assert_eq!(std::fs::read_to_string(&path).expect("there"), text, "untouched");
    }
    std::fs::remove_file(&path).expect("removed");
    std::fs::create_dir(&path).expect("made");
    assert!(matches!(Journal::open(&path), Err(JournalError::System { .. })));
}

/// A store with room for so many bytes.
struct Tight(std::sync::Arc<std::sync::Mutex<(Vec<u8>, usize)>>);

impl Store for Tight {
    fn make_room(&mut self) -> io::Result<()> {
        let (text, room) = &*self.0.lock().expect("no panic");
        if text.len() + 1000 > *room { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }

    fn append(&mut self, line: &[u8]) -> io::Result<u64> {
        let (text, room) = &mut *self.0.lock().expect("no panic");
        if text.len() + line.len() > *room {
            return Err(io::ErrorKind::StorageFull.into());
        }
        text.extend(line);
        Ok(text.len() as u64)
    }

    fn replace(&mut self, lines: &[u8]) -> io::Result<u64> {
        let (text, room) = &mut *self.0.lock().expect("no panic");
        if lines.len() > *room {
            return Err(io::ErrorKind::StorageFull.into());
        }
        lines.clone_into(text);
        Ok(lines.len() as u64)
    }
}

#[test]
fn what_could_not_be_written_is_written_when_there_is_room() {
    let disk = std::sync::Arc::new(std::sync::Mutex::new((Vec::new(), 4000)));
    let mut journal = Journal::over(Box::new(Tight(disk.clone())), Remembered::default());
    journal.append(Entry::Life { format: FORMAT, epoch: 1 }).expect("room");
    journal.append(made("web", 1)).expect("room");
    disk.lock().expect("no panic").1 = 0;
    assert!(journal.prepare().is_err());
    assert!(journal.append(made("db", 1)).is_err());
    assert!(journal.append(Entry::Paused { vm: "db".to_owned(), by: PausedBy::User }).is_err());
    assert!(journal.prepare().is_err());
    disk.lock().expect("no panic").1 = 4000;
    journal.prepare().expect("room again");
    journal.append(Entry::Resumed { vm: "web".to_owned() }).expect("written");
    let text = disk.lock().expect("no panic").0.clone();
    let remembered = Remembered::replay(&text).expect("whole");
    let paused: Vec<_> = remembered.vms().map(|vm| (vm.name.as_str(), vm.paused)).collect();
    assert_eq!(paused, [("web", None), ("db", Some(PausedBy::User))]);
}

#[test]
fn a_long_journal_is_compacted_while_its_controller_lives() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("journal");
    let (_, mut journal) = Journal::open(&path).expect("begun");
    journal.append(made("web", 1)).expect("written");
    let mut largest = 0;
    for generation in 0..20_000 {
        journal.prepare().expect("room");
        journal.append(Entry::Limits { nodes: vec![limits("web", 100, generation)] }).expect("written");
        if generation % 100 == 0 {
            largest = largest.max(std::fs::metadata(&path).expect("there").len());
        }
    }
    assert!(largest > SMALL / 2 && largest <= SMALL + 4096, "{largest}");
    let (remembered, _) = Journal::open(&path).expect("read");
    assert_eq!(remembered.vms().next().and_then(|vm| vm.limits).map(|(generation, _)| generation), Some(19_999));
}

/// A group takes along what is in it, and nothing that is only called alike.
#[test]
fn what_was_moved_is_where_it_was_moved_to() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("journal");
    let (_, mut journal) = Journal::open(&path).expect("begun");
    let moved = |node: &str, to: &str| Entry::Moved { node: node.to_owned(), to: to.to_owned() };
    let unlimited = LimitsInBytes::from(Limits::default());
    let groups = ["/gold", "/gold/web", "/golden", "/iron"];
    let groups = groups.map(|path| Entry::Group { path: path.to_owned(), accounting: false, limits: unlimited });
    let moves = [moved("a", "/gold/web"), moved("b", "/golden"), moved("/gold", "/iron/gold")];
    for entry in groups.into_iter().chain(["a", "b", "c"].map(|vm| made(vm, 1))).chain(moves) {
        journal.append(entry).expect("written");
    }
    drop(journal);
    let (known, _) = Journal::open(&path).expect("read");
    let paths: Vec<_> = known.groups().map(|(path, _)| path).collect();
    assert_eq!(paths, ["/golden", "/iron", "/iron/gold", "/iron/gold/web"]);
    let places: Vec<_> = known.vms().map(|vm| (vm.group.as_str(), vm.config.group.as_str())).collect();
    assert_eq!(places, [("/iron/gold/web", "/iron/gold/web"), ("/golden", "/golden"), ("/", "/")]);
}

/// A VM may have any name, and its directory is beside the journal.
#[test]
fn no_vm_is_in_the_journal_s_way() {
    let dir = tempfile::tempdir().expect("a directory");
    std::fs::create_dir(dir.path().join("journal.new")).expect("a VM's");
    let path = dir.path().join("journal");
    drop(Journal::open(&path).expect("begun"));
    assert_eq!(Journal::open(&path).expect("read").1.epoch(), 2);
}

/// Who removes the directory of a controller that runs has not removed what it remembers.
#[test]
fn a_journal_that_was_removed_is_written_anew() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("state/journal");
    std::fs::create_dir(path.parent().expect("state")).expect("made");
    let (_, mut journal) = Journal::open(&path).expect("begun");
    journal.append(made("first", 1)).expect("written");
    std::fs::remove_dir_all(path.parent().expect("state")).expect("removed");
    journal.prepare().expect("made again");
    journal.append(made("second", 1)).expect("written");
    let (remembered, _) = Journal::open(&path).expect("read");
    assert_eq!(remembered.vms().map(|vm| vm.name.as_str()).collect::<Vec<_>>(), ["first", "second"]);
}

/// What is not a file would be waited for.
#[test]
fn only_a_file_is_a_journal() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("journal");
    rustix::fs::mkfifoat(rustix::fs::CWD, &path, 0o600.into()).expect("a pipe");
    let error = Journal::open(&path).err().expect("refused");
    assert!(error.to_string().contains("not a file"), "{error}");
}
