//! A VM as it is asked for: one description, whether it comes as the flags of `ballast run`, or as JSON over HTTP.

use std::fmt;
use std::fs::File;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::marker::PhantomData;
use std::ops::RangeInclusive;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use balloon::QueueKind;
use memcg_core::frame::{BLOCK, Cost};
use memcg_core::spread::DEFAULT_SHARES;
use memcg_core::tree::{LimitPatch, Limits};
use memcg_core::units::{Limit, Pages, SizeArg, human};
use rustix::io::Errno;
use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use utoipa::ToSchema;

use super::error::{Code, Refusal};
use super::view::{OomAction, OomPreference};
use super::{OomPolicy, VmSpec, host, overhead};
use crate::machine::layout::RamLayout;
use crate::memory::store::spill;
use crate::worker::config::WorkerConfig;

/// Most vCPUs that a VM can have.
pub const MAX_CPUS: u32 = 64;

/// Longest time that a VM may be held: a day, before [`host::scaled`].
const MAX_DEADLINE: Duration = Duration::from_secs(24 * 60 * 60);

/// Defines a structure of the interface that has the seven limits among its keys, in bytes, and their way into pages. They
/// are listed once, here: serde cannot flatten a structure into one that refuses unknown keys.
macro_rules! with_limits {
    (
        $(#[$outer:meta])*
        pub struct $name:ident {
            $($(#[$head:meta])* pub $before:ident: $before_type:ty,)*
            ..limits,
            $($(#[$tail:meta])* pub $after:ident: $after_type:ty,)*
        }
    ) => {
        $(#[$outer])*
        pub struct $name {
            $($(#[$head])* pub $before: $before_type,)*
            /// Never reclaimed below this.
            #[serde(default, deserialize_with = "crate::controller::config::present", skip_serializing_if = "Option::is_none")]
            #[schema(value_type = Option<u64>)]
            pub min_bytes: Option<Option<u64>>,
            /// Reclaimed below this only in need.
            #[serde(default, deserialize_with = "crate::controller::config::present", skip_serializing_if = "Option::is_none")]
            #[schema(value_type = Option<u64>)]
            pub low_bytes: Option<Option<u64>>,
            /// Reclaim starts here.
            #[serde(default, deserialize_with = "crate::controller::config::present", skip_serializing_if = "Option::is_none")]
            #[schema(value_type = Option<u64>)]
            pub high_bytes: Option<Option<u64>>,
            /// No charge is granted above this.
            #[serde(default, deserialize_with = "crate::controller::config::present", skip_serializing_if = "Option::is_none")]
            #[schema(value_type = Option<u64>)]
            pub max_bytes: Option<Option<u64>>,
            /// No eviction above this.
            #[serde(default, deserialize_with = "crate::controller::config::present", skip_serializing_if = "Option::is_none")]
            #[schema(value_type = Option<u64>)]
            pub swap_max_bytes: Option<Option<u64>>,
            /// The memory that contents of evicted pages take is no more than this. `null`: half of `max_bytes`.
            #[serde(default, deserialize_with = "crate::controller::config::present", skip_serializing_if = "Option::is_none")]
            #[schema(value_type = Option<u64>)]
            pub store_max_bytes: Option<Option<u64>>,
            /// Overhead above this is refused.
            #[serde(default, deserialize_with = "crate::controller::config::present", skip_serializing_if = "Option::is_none")]
            #[schema(value_type = Option<u64>)]
            pub vmm_max_bytes: Option<Option<u64>>,
            $($(#[$tail])* pub $after: $after_type,)*
        }

        impl $name {
            /// The limits in pages.
            ///
            /// # Errors
            /// When one is not a multiple of the page size; the refusal names it.
            pub(crate) fn limits(
                &self,
            ) -> Result<memcg_core::tree::LimitPatch, crate::controller::error::Refusal> {
                use crate::controller::config::to_limit;
                Ok(memcg_core::tree::LimitPatch {
                    min: to_limit("min_bytes", self.min_bytes)?,
                    low: to_limit("low_bytes", self.low_bytes)?,
                    high: to_limit("high_bytes", self.high_bytes)?,
                    max: to_limit("max_bytes", self.max_bytes)?,
                    swap_max: to_limit("swap_max_bytes", self.swap_max_bytes)?,
                    store_max: to_limit("store_max_bytes", self.store_max_bytes)?,
                    vmm_max: to_limit("vmm_max_bytes", self.vmm_max_bytes)?,
                    if_generation: None,
                })
            }
        }
    };
}
pub(crate) use with_limits;

/// A VM as it is asked for. What is absent has the default of `ballast run`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// Kernel: bzImage, ELF with a PVH note, or a flat payload. An absolute path: the controller opens it.
    #[schema(value_type = String)]
    pub kernel: PathBuf,
    /// Initial ramdisk, an absolute path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub initrd: Option<PathBuf>,
    /// Directory for a file that takes evicted pages that do not shrink; an absolute path. The file has no name, room for
    /// what `swap_max_bytes` allows, at most for all RAM, and is gone with the VM. Without it such pages stay in memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub swap_dir: Option<PathBuf>,
    /// Kernel command line.
    #[serde(default)]
    pub cmdline: String,
    /// Path of the group that it is made in, such as `/gold`; `/` by default.
    #[serde(default = "root")]
    pub group: String,
    /// Number of vCPUs, 1 to 64.
    #[serde(default = "one")]
    pub cpus: u32,
    /// RAM and limits.
    #[serde(deserialize_with = "object")]
    pub memory: MemoryConfig,
    /// The balloon.
    #[serde(default, deserialize_with = "object")]
    pub balloon: BalloonConfig,
    /// What is done when the VM is held at its limit too long.
    #[serde(default, deserialize_with = "object")]
    pub oom: OomConfig,
    /// The ports of freestanding payloads are offered: exit, wait and print.
    #[serde(default)]
    pub debug_port: bool,
}

with_limits! {
    /// RAM and limits. A limit that is absent has its default; `null` means no limit.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
    #[serde(deny_unknown_fields)]
    pub struct MemoryConfig {
        /// Guest RAM, a multiple of 4096.
        pub size_bytes: u64,
        ..limits,
        /// Whether memory is charged. By default it is with a limit, or where the controller has a budget.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub track: Option<bool>,
        /// Seconds of a generation: how often it is looked at what a guest with a limit uses, 30 by default; 0 for never. It
        /// cannot be changed while the VM runs.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub ageing_s: Option<u32>,
        /// Whether what has been idle for two generations is evicted before anybody needs the memory; not by default. It
        /// needs ageing, and cannot be changed while the VM runs.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub proactive: Option<bool>,
        /// When several have to give, who has twice as many gives half as much: 1 to 10000, 100 by default.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub shares: Option<u32>,
    }
}

/// The balloon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct BalloonConfig {
    /// The guest may take pages back when it is out of memory.
    pub deflate_on_oom: bool,
    /// The guest may report free pages, which the host then takes back.
    pub free_page_reporting: bool,
    /// Seconds between two readings of the guest's statistics, 0 for never.
    pub stats_interval_s: u32,
}

impl Default for BalloonConfig {
    fn default() -> Self {
        Self { deflate_on_oom: false, free_page_reporting: false, stats_interval_s: 1 }
    }
}

/// What is done when a VM is held at its limit too long.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct OomConfig {
    /// The action.
    pub action: OomAction,
    /// How long it may be held; 5 seconds by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deadline_ms: Option<u64>,
    /// Among several candidates, lower goes first.
    pub priority: i32,
    /// Whether it is a candidate when memory is short elsewhere.
    pub preference: OomPreference,
}

fn one() -> u32 {
    1
}

fn root() -> String {
    "/".to_owned()
}

/// Tells `null` from absent.
#[expect(clippy::option_option, reason = "absent, null and a number are three things")]
pub(crate) fn present<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Option<u64>>, D::Error> {
    Option::deserialize(from).map(Some)
}

/// A structure from an object alone. Serde takes a list of its values as well, and `[]` where all have defaults.
pub(crate) fn object<'de, D: Deserializer<'de>, T: Deserialize<'de>>(from: D) -> Result<T, D::Error> {
    struct Object<T>(PhantomData<T>);
    impl<'de, T: Deserialize<'de>> Visitor<'de> for Object<T> {
        type Value = T;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "an object")
        }

        fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
            T::deserialize(MapAccessDeserializer::new(map))
        }
    }
    from.deserialize_map(Object(PhantomData))
}

/// A limit in pages; `null` is no limit.
///
/// # Errors
/// When it is not a multiple of the page size, or larger than any; the refusal names it.
#[expect(clippy::option_option, reason = "absent, null and a number are three things")]
pub(crate) fn to_limit(key: &str, value: Option<Option<u64>>) -> Result<Option<Limit>, Refusal> {
    match value {
        None => Ok(None),
        Some(None) => Ok(Some(Limit::Max)),
        Some(Some(bytes)) => SizeArg::Bytes(bytes)
            .to_limit()
            .map(Some)
            .map_err(|error| Refusal::new(Code::InvalidLimit, format!("{key}: {error}"))),
    }
}

/// What [`MemoryConfig::check`] has found to make sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Guest RAM.
    pub size: Pages,
    /// The limits.
    pub limits: LimitPatch,
    /// Whether memory is charged.
    pub accounting: bool,
}

impl MemoryConfig {
    /// The same in pages.
    ///
    /// # Errors
    /// An impossible size, limits that contradict each other, or `track` off with a limit.
    pub fn check(&self) -> Result<Memory, Refusal> {
        let wrong = |message: String| Refusal::new(Code::InvalidLimit, message);
        let size = SizeArg::Bytes(self.size_bytes).to_pages().map_err(|error| wrong(format!("size: {error}")))?;
        RamLayout::new(size.bytes()).map_err(|error| wrong(format!("size: {error}")))?;
        let limits = self.limits()?;
        limits.apply(Limits::default()).check().map_err(|error| wrong(error.to_string()))?;
        let limited = limits.limits_something();
        if limited && self.track == Some(false) {
            return Err(wrong("track=off contradicts a limit: without accounting there are none".to_owned()));
        }
        Ok(Memory { size, limits, accounting: limited || self.track == Some(true) })
    }
}

impl From<OomPolicy> for OomConfig {
    fn from(policy: OomPolicy) -> Self {
        let deadline_ms = Some(u64::try_from(policy.deadline.as_millis()).unwrap_or(u64::MAX));
        Self { action: policy.action, deadline_ms, priority: policy.priority, preference: policy.preference }
    }
}

impl From<OomConfig> for OomPolicy {
    fn from(config: OomConfig) -> Self {
        let deadline = config.deadline_ms.map_or(Self::default().deadline, Duration::from_millis);
        Self { action: config.action, deadline, priority: config.priority, preference: config.preference }
    }
}

/// Pages that are loaded beside the files: tables of the firmware, page tables, command line, and ends of segments.
const BESIDE_FILES: Pages = Pages(64);

/// Places in RAM at which files and tables begin, at most; each may be in a block of 2 MiB of its own.
const PLACES: u64 = 8;

/// Shares that a VM may have.
const SHARES: RangeInclusive<u32> = 1..=10_000;

/// Seconds of a generation, unless somebody says otherwise.
const AGEING_S: u32 = 30;

/// A VM that makes sense, with its files open.
#[derive(Debug)]
pub struct Plan {
    /// For the actor.
    pub spec: VmSpec,
    /// For the worker.
    pub worker: WorkerConfig,
    /// The kernel.
    pub kernel: File,
    /// The initial ramdisk.
    pub initrd: Option<File>,
    /// The swap file, if there is one.
    pub swap_file: Option<OwnedFd>,
}

impl VmConfig {
    /// Checks everything that can be checked before anything is made, and opens the files.
    ///
    /// # Errors
    /// What makes no sense, or the file that cannot be opened.
    pub fn plan(&self, name: &str) -> Result<Plan, Refusal> {
        let mut spec = self.spec(name)?;
        if self.memory.proactive == Some(true) && self.memory.ageing_s == Some(0) {
            let message = "proactive=on evicts what ageing has found idle, and ageing is off: leave out one of them";
            return Err(Refusal::new(Code::BadRequest, message));
        }
        let kernel = open("kernel", &self.kernel)?;
        let initrd = self.initrd.as_deref().map(|path| open("initrd", path)).transpose()?;
        spec.loading = loading([Some(&kernel), initrd.as_ref()].into_iter().flatten());
        let swap_file_pages = self.swap_file_pages(&spec.limits, spec.size);
        let directory = self.swap_dir.as_deref().filter(|_| swap_file_pages > 0);
        let swap_file = directory.map(|directory| swap_file(directory, swap_file_pages)).transpose()?;
        let worker = WorkerConfig {
            name: name.to_owned(),
            size_bytes: spec.size.bytes(),
            cpus: self.cpus,
            cmdline: self.cmdline.clone(),
            initrd: initrd.is_some(),
            accounting: spec.accounting,
            obstacle: None,
            debug_port: self.debug_port,
            ageing_s: self.memory.ageing_s.unwrap_or(AGEING_S),
            proactive: self.memory.proactive.unwrap_or(false),
            swap_file_pages,
            stats_interval_s: self.balloon.stats_interval_s,
            deflate_on_oom: self.balloon.deflate_on_oom,
            free_page_reporting: self.balloon.free_page_reporting,
            cpuid: Vec::new(),
            follow_vcpu: false,
            die_with_parent: true,
            instance: spec.instance,
        };
        Ok(Plan { spec, worker, kernel, initrd, swap_file })
    }

    /// Pages of the swap file: as many as may be evicted, as things are at the start. 0 without one.
    fn swap_file_pages(&self, limits: &LimitPatch, size: Pages) -> u32 {
        let most = match (&self.swap_dir, limits.swap_max) {
            (None, _) => Pages(0),
            (Some(_), Some(Limit::Pages(most))) => most.min(size),
            (Some(_), _) => size,
        };
        u32::try_from(most.0).unwrap_or(u32::MAX)
    }

    /// What the actor needs to know, without the files. `instance` is drawn anew.
    ///
    /// # Errors
    /// What makes no sense.
    pub fn spec(&self, name: &str) -> Result<VmSpec, Refusal> {
        let wrong = |message: String| Refusal::new(Code::BadRequest, message);
        if !(1..=MAX_CPUS).contains(&self.cpus) {
            return Err(wrong(format!("cpus: {} is not possible: write a number from 1 to {MAX_CPUS}", self.cpus)));
        }
        if self.cmdline.contains('\0') {
            return Err(wrong("cmdline: it has a NUL character in it".to_owned()));
        }
        let oom = OomPolicy::from(self.oom);
        if oom.deadline > host::scaled(MAX_DEADLINE) {
            return Err(wrong("oom: deadline_ms is longer than a day".to_owned()));
        }
        let shares = self.memory.shares.unwrap_or(DEFAULT_SHARES);
        if !SHARES.contains(&shares) {
            return Err(wrong(format!("memory: shares of {shares} are not possible: write a number from 1 to 10000")));
        }
        let Memory { size, limits, accounting } = self.memory.check()?;
        let swap_file_pages = self.swap_file_pages(&limits, size);
        Ok(VmSpec {
            name: name.to_owned(),
            group: self.group.clone(),
            size,
            cpus: self.cpus,
            accounting,
            limits,
            shares,
            oom,
            overhead: overhead::of(size, self.cpus, QueueKind::COUNT as u32, swap_file_pages),
            loading: Pages::ZERO,
            swap_file: Pages(swap_file_pages.into()),
            instance: RandomState::new().hash_one(name),
            config: None,
            console: None,
        })
    }
}

/// File systems whose files are memory, which nobody would be charged for: their magic numbers and names.
const IN_MEMORY: [(u32, &str); 2] = [(0x0102_1994, "tmpfs"), (0x8584_58f6, "ramfs")];

/// What else may be asked for when a swap file cannot be made: where the directory is no good, a smaller one is no good either.
fn instead(error: Option<Errno>) -> &'static str {
    match error {
        Some(Errno::NOSPC | Errno::DQUOT | Errno::FBIG) => {
            "give another directory with --swap-dir, or less swap with --memory swap="
        }
        _ => "give another directory with --swap-dir",
    }
}

/// Makes the swap file of a VM in a directory, for so many pages.
///
/// # Errors
/// Why it cannot be made there.
pub fn swap_file(directory: &Path, pages: u32) -> Result<OwnedFd, Refusal> {
    let refused = |why: String, error: Option<Errno>| {
        let (directory, size) = (directory.display(), human(Pages(pages.into()).bytes()));
        let instead = instead(error);
        Refusal::new(Code::StartFailed, format!("no swap file of {size} can be made in {directory} ({why}): {instead}"))
    };
    // Before it has a size: that would be memory already.
    let failed = |error: io::Error| refused(error.to_string(), Errno::from_io_error(&error));
    let kind = rustix::fs::statfs(directory).map_err(|error| failed(error.into()))?.f_type as u32;
    if let Some((_, name)) = IN_MEMORY.iter().find(|(magic, _)| *magic == kind) {
        return Err(refused(format!("it is on a {name}, whose files are memory that no VM is charged for"), None));
    }
    spill::create(directory, pages).map_err(failed)
}

/// Pages that are written to load these files, at most, with what those cost. What is in the files only the worker reads.
fn loading<'a>(files: impl Iterator<Item = &'a File>) -> Pages {
    let bytes = files.map(|file| file.metadata().map_or(0, |meta| meta.len()));
    let pages = bytes.map(Pages::from_bytes_ceil).sum::<Pages>() + BESIDE_FILES;
    pages + Cost::of(pages.0.div_ceil(BLOCK as u64) + PLACES, 0).total()
}

/// Opens a file that the guest gets.
fn open(option: &str, path: &Path) -> Result<File, Refusal> {
    let what = if option == "initrd" { "initial ramdisk" } else { option };
    let wrong =
        |why: String| Refusal::new(Code::BadRequest, format!("the {what} {} {why} with --{option}", path.display()));
    let failed = |error| wrong(format!("cannot be opened ({error}): give another file"));
    // Opening a pipe would otherwise wait for somebody to write to it.
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(failed)?;
    if file.metadata().map_err(failed)?.is_file() { Ok(file) } else { Err(wrong("is not a file: give one".to_owned())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(json: &str) -> VmConfig {
        serde_json::from_str(json).expect("understood")
    }

    #[test]
    fn shares_are_from_1_to_10000() {
        let with = |shares: &str| {
            let json = format!(r#"{{"kernel": "/k", "memory": {{"size_bytes": 67108864 {shares}}}}}"#);
            config(&json).spec("web").map(|spec| spec.shares).map_err(|refusal| refusal.message)
        };
        assert_eq!(with(""), Ok(100));
        assert_eq!([r#", "shares": 1"#, r#", "shares": 10000"#].map(with), [Ok(1), Ok(10_000)]);
        for wrong in [r#", "shares": 0"#, r#", "shares": 10001"#] {
            let message = with(wrong).expect_err("refused");
            assert!(message.contains("from 1 to 10000"), "{message}");
        }
    }

    #[test]
    fn proactive_needs_ageing() {
        let with = |words: &str| {
            let json = format!(r#"{{"kernel": "/proc/self/exe", "memory": {{"size_bytes": 67108864, {words}}}}}"#);
            config(&json).plan("web").err().map(|refusal| (refusal.code, refusal.message))
        };
        let (code, message) = with(r#""proactive": true, "ageing_s": 0"#).expect("refused");
        assert_eq!(code, Code::BadRequest);
        assert!(message.contains("ageing is off"), "{message}");
        assert_eq!(with(r#""proactive": true"#), None);
        assert_eq!(with(r#""proactive": false, "ageing_s": 0"#), None);
    }

    /// Less of it is advice only where there is too little room.
    #[test]
    fn less_swap_is_advised_where_that_helps() {
        let less = |errno| instead(Some(errno)).contains("less swap");
        assert!([Errno::NOSPC, Errno::DQUOT, Errno::FBIG].into_iter().all(less));
        assert!(![Errno::NOENT, Errno::OPNOTSUPP, Errno::INVAL, Errno::ACCESS, Errno::ROFS].into_iter().any(less));
    }

    /// What is moved there would be in memory again, and outside every limit.
    #[test]
    fn a_swap_file_is_not_made_in_memory() {
        let memory = Path::new("/dev/shm");
        if !rustix::fs::statfs(memory).is_ok_and(|stat| stat.f_type as u32 == IN_MEMORY[0].0) {
            println!("SKIP swap-in-memory reason=/dev/shm-is-no-tmpfs");
            return;
        }
        let refusal = swap_file(memory, 1).expect_err("refused");
        assert_eq!(refusal.code, Code::StartFailed);
        let advice = "is charged for): give another directory with --swap-dir";
        assert!(refusal.message.contains("it is on a tmpfs") && refusal.message.ends_with(advice), "{refusal}");
        let refusal = swap_file(Path::new("/none"), 1).expect_err("refused");
        assert!(refusal.message.contains("No such file"), "{refusal}");
    }

    #[test]
    fn what_is_absent_has_the_default_and_null_is_no_limit() {
        let config = config(r#"{"kernel": "/k", "memory": {"size_bytes": 67108864, "max_bytes": null}}"#);
        assert_eq!((config.cpus, config.balloon, config.debug_port), (1, BalloonConfig::default(), false));
        let memory = config.memory.check().expect("sensible");
        assert_eq!((memory.limits.max, memory.limits.high, memory.accounting), (Some(Limit::Max), None, false));
        assert_eq!(OomPolicy::from(config.oom), OomPolicy::default());
        let again: VmConfig = serde_json::from_str(&serde_json::to_string(&config).unwrap()).unwrap();
        assert_eq!(again, config);
    }

    #[test]
    fn what_makes_no_sense_is_refused_before_a_file_is_opened() {
        for (json, part) in [
            (r#"{"kernel": "/k", "cpus": 0, "memory": {"size_bytes": 67108864}}"#, "from 1 to 64"),
            (r#"{"kernel": "/k", "memory": {"size_bytes": 4096}}"#, "at least 2 MiB"),
            (r#"{"kernel": "/k", "memory": {"size_bytes": 67108865}}"#, "not a multiple"),
            (r#"{"kernel": "/k", "memory": {"size_bytes": 67108864, "max_bytes": 1}}"#, "max_bytes: "),
            (r#"{"kernel": "/k", "memory": {"size_bytes": 67108864, "max_bytes": 4096, "track": false}}"#, "track=off"),
            (r#"{"kernel": "/k", "memory": {"size_bytes": 67108864}, "cmdline": "a\u0000b"}"#, "NUL"),
            (
                r#"{"kernel": "/k", "memory": {"size_bytes": 67108864}, "oom": {"deadline_ms": 99999999999999}}"#,
                "longer than a day",
            ),
            (r#"{"kernel": "/none/k", "memory": {"size_bytes": 67108864}}"#, "the kernel /none/k cannot be opened"),
            (r#"{"kernel": "/", "memory": {"size_bytes": 67108864}}"#, "is not a file: give one with --kernel"),
            (
                r#"{"kernel": "/proc/self/exe", "swap_dir": "/none", "memory": {"size_bytes": 67108864}}"#,
                "no swap file of 64M can be made in /none (No such file or directory (os error 2)): give another",
            ),
        ] {
            let refusal = config(json).plan("web").expect_err(json);
            assert!(refusal.message.contains(part), "{json}: {refusal}");
        }
        for json in [
            r#"{"kernel": "/k"}"#,
            r#"{"kernel": "/k", "memory": {"size_bytes": 1}, "frob": 1}"#,
            r#"{"kernel": "/k", "memory": [67108864]}"#,
            r#"{"kernel": "/k", "memory": {"size_bytes": 67108864}, "oom": []}"#,
        ] {
            assert!(serde_json::from_str::<VmConfig>(json).is_err(), "{json}");
        }
    }
}
