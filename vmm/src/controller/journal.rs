//! What a controller must still know when it has died: one JSON line for each thing that has changed.
//!
//! The journal says what was **asked for** (VMs and their words, limits in force, who paused what). What is **used** is
//! not in it: each worker knows that best and says so to the next controller (`adopt.rs`).
//!
//! ```text
//!  start: read ─► replay ─► compact into a new file, rename ─► append, append, append … ─► (large: compact again)
//!           │ garbled line: no start, the sentence names it
//!           └ last line without its end: the writer died in it, nobody was told that it was done, it is ignored
//! ```
//!
//! * A line is one `write` to a file opened for appending, in the same step of the actor as the change itself and before
//!   its answer. So whatever a client was told is in the journal. A change of many nodes is one line: all or nothing.
//! * Room for the next lines is allocated ahead, and a request is refused before anything is done when there is none
//!   ([`Journal::prepare`]): once something is done, remembering it does not fail for want of space.
//! * No `fsync` after a line. The page cache survives the death of the controller, and with the host die all workers.
//!   Measured, a line of 200 bytes on ext4: 0.7 µs (p99 4 µs), and 4 ms with `fdatasync` (p99 16 ms), during which the actor
//!   would stand still. Compaction does sync, so that a host's crash leaves the old or the new file.

mod vm;

use memcg_core::tree::{self, LimitPatch, Limits};
use memcg_core::units::{Limit, Pages};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::actor::Actor;
use super::config::VmConfig;
use super::error::{Code, Refusal};
use super::groups;
use super::view::PausedBy;
use super::vm::KilledBy;
pub use vm::RememberedVm;

/// Format of the lines. A line that this program does not know is refused whatever the number says; it is for people.
const FORMAT: u32 = 1;

/// Bytes of the next lines that are allocated before they are needed: more than the largest request has.
const AHEAD: u64 = 128 * 1024;

/// Size below which a journal is never compacted while its controller lives.
const SMALL: u64 = 1 << 20;

/// The six limits and the store's in bytes, `None` for none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "the names are those of the interface")]
pub struct LimitsInBytes {
    pub min: Option<u64>,
    pub low: Option<u64>,
    pub high: Option<u64>,
    pub max: Option<u64>,
    pub swap_max: Option<u64>,
    pub store_max: Option<u64>,
    pub vmm_max: Option<u64>,
}

impl From<Limits> for LimitsInBytes {
    fn from(limits: Limits) -> Self {
        let Limits { min, low, high, max, swap_max, store_max, vmm_max } = limits;
        let bytes = Limit::as_bytes;
        Self {
            min: bytes(min),
            low: bytes(low),
            high: bytes(high),
            max: bytes(max),
            swap_max: bytes(swap_max),
            store_max: bytes(store_max),
            vmm_max: bytes(vmm_max),
        }
    }
}

impl From<LimitsInBytes> for LimitPatch {
    fn from(limits: LimitsInBytes) -> Self {
        let LimitsInBytes { min, low, high, max, swap_max, store_max, vmm_max } = limits;
        let limit = |bytes: Option<u64>| Some(bytes.map_or(Limit::Max, |bytes| Limit::Pages(Pages(bytes / 4096))));
        Self {
            min: limit(min),
            low: limit(low),
            high: limit(high),
            max: limit(max),
            swap_max: limit(swap_max),
            store_max: limit(store_max),
            vmm_max: limit(vmm_max),
            if_generation: None,
        }
    }
}

/// Limits that are in force at one node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeLimits {
    /// Name of a VM, or path of a group, which begins with `/`.
    pub node: String,
    /// Generation of these limits.
    pub generation: u64,
    /// The limits.
    pub limits: LimitsInBytes,
}

/// Something that has changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Entry {
    /// A controller has begun to live. First line of each journal.
    Life {
        /// Format of the lines.
        format: u32,
        /// Number of this controller's life.
        epoch: u32,
    },
    /// A VM was made, in place of one of its name that has ended. Its worker may not be there yet.
    Made {
        /// Its name.
        vm: String,
        /// Path of the group that it is in.
        group: String,
        /// What its worker calls itself.
        instance: u64,
        /// Whether it is charged from its start.
        accounting: bool,
        /// As it was asked for.
        config: Box<VmConfig>,
    },
    /// A group was made.
    Group {
        /// Its path.
        path: String,
        /// Whether what is in it is charged.
        accounting: bool,
        /// Its limits.
        limits: LimitsInBytes,
    },
    /// A group was removed.
    GroupGone {
        /// Its path.
        path: String,
    },
    /// The account of a group, or of the host, has begun without a limit.
    Tracked {
        /// Its path.
        group: String,
    },
    /// Limits have come into force, at all these nodes at once.
    Limits {
        /// The nodes.
        nodes: Vec<NodeLimits>,
    },
    /// A VM or a group, with everything in it, is in another group.
    Moved {
        /// Name of the VM, or path that the group had.
        node: String,
        /// Path of the group that the VM is in, or path that the group has.
        to: String,
    },
    /// The vCPUs of a VM were stopped.
    Paused {
        /// Its name.
        vm: String,
        /// Who may let it go on.
        by: PausedBy,
    },
    /// The vCPUs of a VM go on.
    Resumed {
        /// Its name.
        vm: String,
    },
    /// A VM's worker was sent SIGKILL, and is not gone yet.
    Killed {
        /// Its name.
        vm: String,
        /// Who has ended it.
        by: KilledBy,
    },
    /// A VM has ended and is still shown.
    Ended {
        /// Its name.
        vm: String,
        /// How, for people.
        how: String,
    },
    /// A VM was removed: nobody knows it any more.
    Gone {
        /// Its name.
        vm: String,
    },
}

/// A group that is remembered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RememberedGroup {
    /// Whether what is in it is charged.
    pub accounting: bool,
    /// Its limits.
    pub limits: LimitsInBytes,
    /// The generation of its limits.
    pub generation: u64,
}

/// Everything that is remembered.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Remembered {
    /// Number of the controller's life.
    pub epoch: u32,
    /// Number of the next VM, to keep them in their order.
    next: u64,
    /// By path, so that a group comes before those in it. The root is there once its limits were changed.
    groups: BTreeMap<String, RememberedGroup>,
    vms: BTreeMap<u64, RememberedVm>,
    names: BTreeMap<String, u64>,
}

impl Remembered {
    /// The VMs, the oldest first.
    pub fn vms(&self) -> impl Iterator<Item = &RememberedVm> {
        self.vms.values()
    }

    /// The groups with their paths, each before those in it.
    pub fn groups(&self) -> impl Iterator<Item = (&str, &RememberedGroup)> {
        self.groups.iter().map(|(path, group)| (path.as_str(), group))
    }

    fn set_limits(&mut self, NodeLimits { node, generation, limits }: NodeLimits) -> Result<(), String> {
        if !node.starts_with('/') {
            self.vm(&node)?.limits = Some((generation, limits));
        } else {
            let group = self.group(node)?;
            // The first limit begins the account.
            let accounting = group.accounting || LimitPatch::from(limits).limits_something();
            *group = RememberedGroup { accounting, limits, generation };
        }
        Ok(())
    }

    /// The group with this path.
    ///
    /// # Errors
    /// When there is none.
    fn group(&mut self, path: String) -> Result<&mut RememberedGroup, String> {
        if path == "/" {
            let limits = LimitsInBytes::from(Limits::default());
            let root = || RememberedGroup { accounting: false, limits, generation: 0 };
            return Ok(self.groups.entry(path).or_insert_with(root));
        }
        self.groups.get_mut(&path).ok_or_else(|| format!("no group {path} was made before"))
    }

    /// The VM of this name.
    ///
    /// # Errors
    /// When there is none.
    fn vm(&mut self, name: &str) -> Result<&mut RememberedVm, String> {
        let number = self.names.get(name).ok_or_else(|| format!("no VM named {name:?} was made before"))?;
        Ok(self.vms.get_mut(number).expect("both maps have it"))
    }

    fn forget(&mut self, name: &str) {
        if let Some(number) = self.names.remove(name) {
            self.vms.remove(&number);
        }
    }

    /// Changes what is remembered.
    ///
    /// # Errors
    /// A sentence when the entry contradicts what was before it.
    fn move_to(&mut self, node: &str, to: String) -> Result<(), String> {
        if !node.starts_with('/') {
            self.vm(node)?.set_group(to);
            return Ok(());
        }
        let moved = |path: &str| groups::moved(path, node, &to);
        let groups = std::mem::take(&mut self.groups).into_iter();
        self.groups = groups.map(|(path, group)| (moved(&path).unwrap_or(path), group)).collect();
        for vm in self.vms.values_mut() {
            if let Some(group) = moved(&vm.group) {
                vm.set_group(group);
            }
        }
        Ok(())
    }

    fn apply(&mut self, entry: Entry) -> Result<(), String> {
        match entry {
            Entry::Life { epoch, .. } if epoch <= self.epoch => return Err(format!("life {epoch} has been before")),
            Entry::Life { epoch, .. } => self.epoch = epoch,
            Entry::Group { path, accounting, limits } => {
                check_path(&path)?;
                self.groups.insert(path, RememberedGroup { accounting, limits, generation: 0 });
            }
            Entry::GroupGone { path } => drop(self.groups.remove(&path)),
            Entry::Tracked { group } => self.group(group)?.accounting = true,
            Entry::Made { vm: name, group, instance, accounting, config } => {
                if !tree::is_name(&name) {
                    return Err(format!("{name:?} is not the name of a VM"));
                }
                check_path(&group)?;
                self.forget(&name);
                self.next += 1;
                self.names.insert(name.clone(), self.next);
                let vm = RememberedVm::made(name, group, (instance, accounting), *config);
                self.vms.insert(self.next, vm);
            }
            Entry::Limits { nodes } => {
                for node in nodes {
                    self.set_limits(node)?;
                }
            }
            Entry::Moved { node, to } => {
                check_path(&to)?;
                self.move_to(&node, to)?;
            }
            Entry::Paused { vm, by } => self.vm(&vm)?.set_paused(by),
            Entry::Resumed { vm } => {
                let vm = self.vm(&vm)?;
                (vm.paused, vm.kept_paused) = (None, false);
            }
            Entry::Killed { vm, by } => self.vm(&vm)?.killed = Some(by),
            Entry::Ended { vm, how } => self.vm(&vm)?.ended = Some(how),
            Entry::Gone { vm } => self.forget(&vm),
        }
        Ok(())
    }

    /// The entries that say all of it.
    fn entries(&self) -> Vec<Entry> {
        let mut entries = vec![Entry::Life { format: FORMAT, epoch: self.epoch }];
        for (path, RememberedGroup { accounting, limits, generation }) in self.groups.clone() {
            let node = NodeLimits { node: path.clone(), generation, limits };
            if path != "/" {
                entries.push(Entry::Group { path, accounting, limits });
            } else if accounting {
                entries.push(Entry::Tracked { group: path });
            }
            if generation > 0 {
                entries.push(Entry::Limits { nodes: vec![node] });
            }
        }
        entries.extend(self.vms.values().cloned().flat_map(RememberedVm::entries));
        entries
    }

    /// What the lines say.
    ///
    /// # Errors
    /// Number of the line, from 1, and what is wrong with it.
    fn replay(text: &[u8]) -> Result<Self, (usize, String)> {
        let mut remembered = Self::default();
        // What follows the last end of a line was being written when its writer died.
        let whole = text.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        let lines = text[..whole].split(|byte| *byte == b'\n').zip(1..);
        for (line, number) in lines.filter(|(line, _)| !line.is_empty()) {
            let entry: Entry = serde_json::from_slice(line).map_err(|error| (number, error.to_string()))?;
            if number == 1 && !matches!(entry, Entry::Life { .. }) {
                return Err((number, "a journal begins with the number of a life".to_owned()));
            }
            remembered.apply(entry).map_err(|error| (number, error))?;
        }
        Ok(remembered)
    }
}

/// Names become directories: those of a damaged journal may not lead elsewhere.
fn check_path(path: &str) -> Result<(), String> {
    groups::path(path).map(drop).map_err(|refusal| refusal.message)
}

fn lines(entries: &[Entry]) -> Vec<u8> {
    let mut text = Vec::new();
    for entry in entries {
        serde_json::to_writer(&mut text, entry).expect("entries are plain data");
        text.push(b'\n');
    }
    text
}

/// Why there is no journal.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// A line is not understood.
    #[error(
        "line {line} of {path} is not understood ({why}): it is damaged, or a newer ballast wrote it; start the ballast \
         that wrote it, or mend the line, or move the file away: VMs that run are then left alone until `ballast rm NAME`"
    )]
    Garbled {
        /// Path of the journal.
        path: String,
        /// Number of the line, from 1.
        line: usize,
        /// What is wrong.
        why: String,
    },
    /// It cannot be read or written.
    #[error("the journal {path} cannot be used ({source}): choose another --state-dir, or make room")]
    System {
        /// Path of the journal.
        path: String,
        /// The system's reason.
        source: io::Error,
    },
}

/// Where lines go.
pub trait Store: Send {
    /// Whether nobody will find here what is appended.
    fn is_lost(&self) -> bool {
        false
    }

    /// Makes sure that lines of [`AHEAD`] bytes together can be appended.
    ///
    /// # Errors
    /// When there is no room.
    fn make_room(&mut self) -> io::Result<()>;
    /// Appends a line, whole or not at all. Returns the size of the journal.
    ///
    /// # Errors
    /// As the system says.
    fn append(&mut self, line: &[u8]) -> io::Result<u64>;
    /// Puts other lines in the place of all. Returns their size.
    ///
    /// # Errors
    /// As the system says; nothing has changed then.
    fn replace(&mut self, lines: &[u8]) -> io::Result<u64>;
}

/// A journal in a file.
struct InFile {
    path: PathBuf,
    file: File,
    size: u64,
    /// Up to where blocks are allocated.
    allocated: u64,
}

impl InFile {
    /// Writes a new journal beside the old one and puts it in its place.
    fn create(path: &Path, lines: &[u8]) -> io::Result<Self> {
        // Beside it are the directories of the VMs: none of these has a name that begins with a dot.
        let new = path.with_file_name(".journal.new");
        match std::fs::remove_file(&new) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let written = || -> io::Result<File> {
            if let Some(directory) = path.parent() {
                DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
            }
            let mut file = File::options().append(true).create_new(true).mode(0o600).open(&new)?;
            file.write_all(lines)?;
            file.sync_all()?;
            std::fs::rename(&new, path)?;
            Ok(file)
        };
        let file = written().inspect_err(|_| drop(std::fs::remove_file(&new)))?;
        let size = lines.len() as u64;
        Ok(Self { path: path.to_owned(), file, size, allocated: size })
    }
}

impl Store for InFile {
    fn is_lost(&self) -> bool {
        let id = |found: std::fs::Metadata| (found.dev(), found.ino());
        std::fs::symlink_metadata(&self.path).map(id).ok() != self.file.metadata().map(id).ok()
    }

    fn make_room(&mut self) -> io::Result<()> {
        if self.allocated >= self.size + AHEAD {
            return Ok(());
        }
        let flags = rustix::fs::FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(&self.file, flags, self.size, 2 * AHEAD) {
            Ok(()) => self.allocated = self.size + 2 * AHEAD,
            // A file system that cannot promise: the line itself finds out.
            Err(rustix::io::Errno::OPNOTSUPP) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    fn append(&mut self, line: &[u8]) -> io::Result<u64> {
        match self.file.write(line) {
            Ok(written) if written == line.len() => {
                self.size += line.len() as u64;
                Ok(self.size)
            }
            part => {
                // The next line must not continue this one.
                self.file.set_len(self.size)?;
                self.allocated = self.size;
                Err(part.err().unwrap_or_else(|| io::ErrorKind::StorageFull.into()))
            }
        }
    }

    fn replace(&mut self, lines: &[u8]) -> io::Result<u64> {
        *self = Self::create(&self.path, lines)?;
        Ok(self.size)
    }
}

/// The journal of one controller. `run` has one that remembers nothing.
#[derive(Default)]
pub struct Journal {
    store: Option<Box<dyn Store>>,
    remembered: Remembered,
    /// Size after the last compaction.
    compact: u64,
    /// A line could not be written: the next one is all of them.
    behind: bool,
}

impl Journal {
    /// Opens the journal at `path`, or begins one, for the controller's next life. Returns it with what it remembers.
    ///
    /// # Errors
    /// See [`JournalError`]. The file is unchanged then.
    pub fn open(path: &Path) -> Result<(Remembered, Self), JournalError> {
        let name = || path.display().to_string();
        let failed = |source| JournalError::System { path: name(), source };
        let text = match std::fs::symlink_metadata(path) {
            Ok(found) if found.is_dir() => return Err(failed(io::ErrorKind::IsADirectory.into())),
            Ok(found) if !found.is_file() => return Err(failed(io::Error::other("it is not a file"))),
            Ok(_) => std::fs::read(path).map_err(failed)?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(e) => return Err(failed(e)),
        };
        let garbled = |(line, why)| JournalError::Garbled { path: name(), line, why };
        let mut remembered = Remembered::replay(&text).map_err(garbled)?;
        remembered.epoch += 1;
        let store = InFile::create(path, &lines(&remembered.entries())).map_err(failed)?;
        Ok((remembered.clone(), Self::over(Box::new(store), remembered)))
    }

    /// The same over any store whose lines are `text`.
    ///
    /// # Errors
    /// Number of the line that is not understood, from 1, and why; or 0 and why the store cannot be written.
    pub fn reopen(text: &[u8], mut store: Box<dyn Store>) -> Result<(Remembered, Self), (usize, String)> {
        let mut remembered = Remembered::replay(text)?;
        remembered.epoch += 1;
        store.replace(&lines(&remembered.entries())).map_err(|error| (0, error.to_string()))?;
        Ok((remembered.clone(), Self::over(store, remembered)))
    }

    /// A journal over any store that already has what is `remembered`.
    fn over(store: Box<dyn Store>, remembered: Remembered) -> Self {
        Self { store: Some(store), remembered, compact: 0, behind: false }
    }

    /// Number of this controller's life, from 1.
    pub fn epoch(&self) -> u32 {
        self.remembered.epoch.max(1)
    }

    /// Removes the journal at `path` when nothing in it is worth a next controller's knowing.
    pub fn remove_if_empty(path: &Path) {
        let empty = |text: Vec<u8>| {
            Remembered::replay(&text).is_ok_and(|remembered| remembered.vms.is_empty() && remembered.groups.is_empty())
        };
        if std::fs::read(path).is_ok_and(empty) {
            // One that stays is read by the next.
            let _ = std::fs::remove_file(path);
        }
    }

    /// Makes sure that what is about to be done can be remembered.
    ///
    /// # Errors
    /// When it cannot.
    pub fn prepare(&mut self) -> io::Result<()> {
        if self.behind || self.store.as_ref().is_some_and(|store| store.is_lost()) {
            self.compact()?;
        }
        self.store.as_mut().map_or(Ok(()), |store| store.make_room())
    }

    /// Writes all that is remembered anew.
    fn compact(&mut self) -> io::Result<()> {
        let Some(store) = &mut self.store else { return Ok(()) };
        self.compact = store.replace(&lines(&self.remembered.entries()))?;
        self.behind = false;
        Ok(())
    }

    /// Remembers what was done.
    ///
    /// # Errors
    /// When it could not be written.
    pub fn append(&mut self, entry: Entry) -> io::Result<()> {
        let Some(store) = &mut self.store else { return Ok(()) };
        let line = lines(std::slice::from_ref(&entry));
        if let Err(why) = self.remembered.apply(entry) {
            // Then the actor does not know what it has said before. The next controller had better read sense.
            debug_assert!(false, "what was to be remembered contradicts what is: {why}");
            tracing::error!(why, "an entry was left out of the journal: this is a bug of ballast");
            return Ok(());
        }
        if self.behind {
            return self.compact();
        }
        let size = store.append(&line).inspect_err(|_| self.behind = true)?;
        if size <= SMALL.max(4 * self.compact) {
            return Ok(());
        }
        // When that fails the line is there all the same: tried again when the journal has grown as much again.
        self.compact().inspect_err(|_| self.compact = size)
    }
}

impl Actor {
    /// Refuses a request that could not be remembered; to be asked before anything is done.
    ///
    /// # Errors
    /// When the journal has no room.
    pub fn can_remember(&mut self) -> Result<(), Refusal> {
        self.journal.prepare().map_err(|error| {
            let message = format!(
                "the journal of the controller cannot be written ({error}): make room where its \
                                   --state-dir is, then ask again"
            );
            Refusal::new(Code::CannotRemember, message)
        })
    }

    /// Remembers what was done just now. One entry is one line: it is there as a whole, or not at all.
    pub fn remember(&mut self, entry: Entry) {
        if let Err(error) = self.journal.append(entry) {
            // It is done already. Only a next controller would not know of it.
            tracing::error!(%error, "the journal cannot be written: make room where the --state-dir is");
        }
    }
}

#[cfg(test)]
mod tests;
