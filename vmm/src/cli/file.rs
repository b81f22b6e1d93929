//! `--config FILE.toml`: a VM in a file, with the words of the options.
//!
//! ```toml
//! name = "web"
//! group = "/gold"                   # for create, / by default; run has no groups and takes no notice
//! kernel = "vmlinux"                # paths are relative to the file
//! initrd = "initrd.img"
//! cmdline = "quiet panic=-1 pci=off"
//! cpus = 2
//!
//! [memory]                          # --memory size=1G,max=512M,…
//! size = "1G"
//! max = "512M"
//! high = "448M"
//!
//! [balloon]                         # --balloon free_page_reporting=on,…
//! deflate_on_oom = true
//! stats_interval = "1s"
//!
//! [oom]                             # --oom action=kill,…
//! action = "kill"
//! deadline = "5s"
//! ```
//!
//! A value is text, a number, or `true` and `false` for `on` and `off`. What is wrong is said with the number of its line.
//! An option on the command line takes the place of the word, or the whole table, of its name.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use toml::Spanned;

use super::Failure;
use super::options::{BalloonArg, MemoryArg, OomArg, PairError, Pairs, group_path, name};
use super::vm_args::cpus;

/// Bytes that a file may have: far more than any has, and little memory.
const LARGEST: u64 = 1 << 20;

/// What is in a file, checked.
#[derive(Debug, Default)]
pub struct VmFile {
    pub name: Option<String>,
    pub group: Option<String>,
    pub kernel: Option<PathBuf>,
    pub initrd: Option<PathBuf>,
    pub swap_dir: Option<PathBuf>,
    pub cmdline: Option<String>,
    pub cpus: Option<u32>,
    pub debug_port: Option<bool>,
    pub memory: Option<MemoryArg>,
    pub balloon: Option<BalloonArg>,
    pub oom: Option<OomArg>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Contents {
    name: Option<Spanned<String>>,
    group: Option<Spanned<String>>,
    kernel: Option<PathBuf>,
    initrd: Option<PathBuf>,
    swap_dir: Option<PathBuf>,
    cmdline: Option<String>,
    cpus: Option<Spanned<i64>>,
    debug_port: Option<bool>,
    memory: Option<Spanned<Table>>,
    balloon: Option<Spanned<Table>>,
    oom: Option<Spanned<Table>>,
}

type Table = BTreeMap<String, Spanned<Value>>;

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected text, a whole number, true or false")]
enum Value {
    Flag(bool),
    Number(i64),
    Text(String),
}

impl Value {
    /// As it would be written in an option.
    fn word(&self) -> String {
        match self {
            Self::Flag(true) => "on".to_owned(),
            Self::Flag(false) => "off".to_owned(),
            Self::Number(number) => number.to_string(),
            Self::Text(text) => text.clone(),
        }
    }
}

/// What is wrong, and where in the text.
type Wrong = (Option<Range<usize>>, String);

impl VmFile {
    /// Reads the file at `path`.
    ///
    /// # Errors
    /// When it cannot be read, is larger than 1 MiB, or is not such a file.
    pub fn read(path: &Path) -> Result<Self, Failure> {
        let text = contents(path)
            .map_err(|error| Failure::usage(format!("--config: {} cannot be read: {error}", path.display())))?;
        let place = path.parent().unwrap_or(Path::new(""));
        Self::parse(&text, place).map_err(|(span, message)| {
            let line = span.map(|span| text[..span.start].matches('\n').count() + 1);
            let line = line.map(|line| format!(":{line}")).unwrap_or_default();
            Failure::usage(format!("{}{line}: {message}", path.display()))
        })
    }

    fn parse(text: &str, place: &Path) -> Result<Self, Wrong> {
        let contents: Contents = toml::from_str(text).map_err(|error| (error.span(), error.message().to_owned()))?;
        let checked = |text: Option<Spanned<String>>, check: fn(&str) -> Result<String, String>| {
            let check = |text: Spanned<String>| check(text.get_ref()).map_err(|wrong| (Some(text.span()), wrong));
            text.map(check).transpose()
        };
        Ok(Self {
            name: checked(contents.name, name)?,
            group: checked(contents.group, group_path)?,
            kernel: contents.kernel.map(|path| place.join(path)),
            initrd: contents.initrd.map(|path| place.join(path)),
            swap_dir: contents.swap_dir.map(|path| place.join(path)),
            cmdline: contents.cmdline,
            cpus: contents
                .cpus
                .map(|number| cpus(&number.get_ref().to_string()).map_err(|wrong| (Some(number.span()), wrong)))
                .transpose()?,
            debug_port: contents.debug_port,
            memory: table(contents.memory)?,
            balloon: table(contents.balloon)?,
            oom: table(contents.oom)?,
        })
    }
}

/// The text of a file, or of a pipe. A device may have no end.
fn contents(path: &Path) -> io::Result<String> {
    let file = File::open(path)?;
    let kind = file.metadata()?.file_type();
    if !kind.is_file() && !kind.is_fifo() {
        return Err(io::Error::other("it is neither a file nor a pipe"));
    }
    let mut text = String::new();
    match file.take(LARGEST + 1).read_to_string(&mut text)? as u64 {
        0..=LARGEST => Ok(text),
        _ => Err(io::Error::other("it is larger than 1 MiB")),
    }
}

/// An option with several words, from a table.
fn table<T: Pairs>(table: Option<Spanned<Table>>) -> Result<Option<T>, Wrong> {
    let Some(table) = table else { return Ok(None) };
    let span = table.span();
    let words: Vec<_> = table.get_ref().iter().map(|(key, value)| (key.as_str(), value.get_ref().word())).collect();
    let pairs = words.iter().map(|(key, value)| (*key, value.as_str()));
    T::from_pairs(pairs).map(Some).map_err(|PairError { key, message }| {
        let at = key.and_then(|key| table.get_ref().get(&key)).map(Spanned::span);
        (Some(at.unwrap_or(span)), message)
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use memcg_core::units::{Limit, Pages};

    use super::*;
    use crate::controller::view::OomAction;

    /// The example at the head of this file.
    fn example() -> String {
        let lines = include_str!("file.rs").lines().map_while(|line| line.strip_prefix("//!"));
        let lines = lines.skip_while(|line| *line != " ```toml").skip(1).take_while(|line| *line != " ```");
        lines.map(|line| format!("{}\n", line.strip_prefix(' ').unwrap_or(line))).collect()
    }

    #[test]
    fn the_example_is_understood_and_is_the_one_in_the_readme() {
        let file = VmFile::parse(&example(), Path::new("/etc/ballast")).expect("understood");
        assert_eq!((file.name.as_deref(), file.group.as_deref()), (Some("web"), Some("/gold")));
        assert_eq!(file.kernel, Some("/etc/ballast/vmlinux".into()));
        assert_eq!(file.initrd, Some("/etc/ballast/initrd.img".into()));
        assert_eq!((file.cpus, file.debug_port), (Some(2), None));
        let memory = file.memory.expect("there").memory;
        assert_eq!((memory.size, memory.limits.max), (Pages::from_mib(1024), Some(Limit::Pages(Pages::from_mib(512)))));
        assert!(file.balloon.expect("there").0.deflate_on_oom);
        let oom = file.oom.expect("there").0;
        assert_eq!(
            (oom.action, oom.deadline),
            (OomAction::Kill, crate::controller::host::scaled(Duration::from_secs(5)))
        );
        let readme = concat!(env!("CARGO_MANIFEST_DIR"), "/../README.md");
        let readme = std::fs::read_to_string(readme).expect("the README");
        assert!(readme.contains(&example()), "the README has another example");
    }

    #[test]
    fn what_is_wrong_is_said_with_its_line() {
        for (text, line, part) in [
            ("kernel = ", 1, ""),
            ("cpus = 1\nkernal = \"k\"", 2, "unknown field `kernal`, expected one of `name`"),
            ("\n\ncpus = 0", 3, "write a number from 1 to 64"),
            ("cpus = 1.5", 1, "invalid type"),
            ("name = \"a/b\"", 1, "is not a name"),
            ("cpus = 1\ngroup = \"gold\"", 2, "gold"),
            ("[memory]\nsize = \"1G\"\n\nmax = \"50%\"", 4, "max: \"50%\" is a percentage"),
            ("cpus = 1\n[memory]\nmax = \"1G\"", 2, "size is missing: write for example size=1G"),
            ("[memory]\nsize = 1073741824\nlimit = 5", 3, "there is no key \"limit\"; the keys are size, max"),
            (
                "[memory]\nsize = \"1G\"\nmax = \"64M\"\nmin = \"128M\"",
                1,
                "memory.min 128M would be above memory.max 64M",
            ),
            ("[memory]\nsize = \"1G\"\nsize = \"2G\"", 3, "duplicate key"),
            ("[memory]\nsize = [1]", 2, "expected text, a whole number, true or false"),
            ("[balloon]\nstats_interval = \"500ms\"", 2, "not a whole number of seconds"),
            ("[oom]\naction = \"shoot\"", 2, "neither pause nor kill"),
            ("[[memory]]\nsize = \"1G\"", 1, "invalid type"),
            ("debug_port = \"yes\"", 1, "invalid type"),
        ] {
            let (span, message) = VmFile::parse(text, Path::new("")).map(drop).expect_err(text);
            let found = text[..span.expect("a place").start].matches('\n').count() + 1;
            assert_eq!(found, line, "{text}: {message}");
            assert!(message.contains(part), "{text}: {message}");
        }
    }

    #[test]
    fn what_has_no_end_is_not_read_to_it() {
        let place = tempfile::tempdir().unwrap();
        let large = place.path().join("large.toml");
        let refused = |path: &Path| VmFile::read(path).expect_err("refused").message;
        std::fs::write(&large, vec![b'#'; 1 << 20]).unwrap();
        assert!(VmFile::read(&large).is_ok(), "1 MiB is allowed");
        std::fs::write(&large, vec![b'#'; (1 << 20) + 1]).unwrap();
        assert!(refused(&large).ends_with("large.toml cannot be read: it is larger than 1 MiB"), "{}", refused(&large));
        for none in ["/dev/zero", "/"] {
            assert!(
                refused(Path::new(none)).ends_with("it is neither a file nor a pipe"),
                "{}",
                refused(Path::new(none))
            );
        }
        let (reader, mut writer) = io::pipe().unwrap();
        let writing = std::thread::spawn(move || while io::Write::write_all(&mut writer, &[b'#'; 4096]).is_ok() {});
        let pipe = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&reader));
        assert!(refused(Path::new(&pipe)).ends_with("larger than 1 MiB"), "{}", refused(Path::new(&pipe)));
        drop(reader);
        writing.join().unwrap();
    }

    #[test]
    fn on_off_and_numbers_are_what_they_are_in_options() {
        let text = "[memory]\nsize = 67108864\ntrack = true\n[balloon]\ndeflate_on_oom = \"on\"\n[oom]\npriority = -3";
        let file = VmFile::parse(text, Path::new("")).expect("understood");
        assert!(file.memory.expect("there").memory.accounting && file.balloon.expect("there").0.deflate_on_oom);
        assert_eq!(file.oom.expect("there").0.priority, -3);
    }
}
