//! Options with several words in them: `--memory size=1G,max=512M`.

use std::str::FromStr;
use std::time::Duration;

use memcg_core::tree::Tree;
use memcg_core::units::{Limit, Pages, SizeArg, SizeError, parse_size};

use crate::controller::OomPolicy;
use crate::controller::config::{BalloonConfig, Memory, MemoryConfig};
use crate::controller::groups;
use crate::controller::host::scaled;
use crate::controller::view::{OomAction, OomPreference};

/// Longest duration that is believed.
const MAX_DURATION: Duration = Duration::from_secs(24 * 60 * 60);

/// Why pairs make no sense.
#[derive(Debug, PartialEq, Eq)]
pub struct PairError {
    /// Of the pair that is wrong, if it is one.
    pub key: Option<String>,
    /// One sentence.
    pub message: String,
}

impl From<String> for PairError {
    fn from(message: String) -> Self {
        Self { key: None, message }
    }
}

/// An option with several words in it.
pub trait Pairs: Sized {
    /// The keys that there are.
    const KEYS: &[&str];

    /// Understands what is said, each key once.
    ///
    /// # Errors
    /// A sentence that says what to write.
    fn from_pairs<'p>(pairs: impl Iterator<Item = (&'p str, &'p str)>) -> Result<Self, PairError>;

    /// Understands `key=value,key=value`.
    ///
    /// # Errors
    /// A sentence that says what to write.
    fn from_words(text: &str) -> Result<Self, String> {
        let pair = |text: &'_ str| -> Result<(String, String), String> {
            let (key, value) = text
                .split_once('=')
                .ok_or_else(|| format!("{text:?} is not KEY=VALUE; the keys are {}", Self::KEYS.join(", ")))?;
            Ok((key.to_owned(), value.to_owned()))
        };
        let pairs = text.split(',').map(pair).collect::<Result<Vec<_>, _>>()?;
        let pairs = pairs.iter().map(|(key, value)| (key.as_str(), value.as_str()));
        Self::from_pairs(pairs).map_err(|error| error.message)
    }
}

/// Goes through pairs; every key may occur once.
fn each_pair<'p>(
    pairs: impl Iterator<Item = (&'p str, &'p str)>,
    known: &[&str],
    mut set: impl FnMut(&str, &str) -> Result<(), String>,
) -> Result<(), PairError> {
    let mut seen = Vec::new();
    for (key, value) in pairs {
        let wrong = |message| PairError { key: Some(key.to_owned()), message };
        if !known.contains(&key) {
            return Err(wrong(format!("there is no key {key:?}; the keys are {}", known.join(", "))));
        }
        if seen.contains(&key) {
            return Err(wrong(format!("{key} is given twice")));
        }
        seen.push(key);
        set(key, value).map_err(|error| wrong(format!("{key}: {error}")))?;
    }
    Ok(())
}

/// A limit from a size or `max`.
pub fn limit(text: &str) -> Result<Limit, String> {
    parse_size(text).and_then(SizeArg::to_limit).map_err(|error| error.to_string())
}

/// The size of guest RAM; there is no `max` to write instead of a size that makes no sense.
fn ram(text: &str) -> Result<Pages, String> {
    parse_size(text).and_then(SizeArg::to_pages).map_err(|error| match error {
        SizeError::Empty | SizeError::Negative(_) => format!("{text:?} is not a size: write for example size=512M"),
        error => error.to_string(),
    })
}

pub fn on_off(text: &str) -> Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(format!("{text:?} is neither on nor off")),
    }
}

/// A duration such as `5s`, `500ms`, `2m` or `1h`, at most a day.
///
/// # Errors
/// A sentence that says what to write.
pub fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor: u64 = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => {
            return Err(format!("{text:?} is not a duration: write a number with ms, s, m or h such as 5s"));
        }
    };
    let millis = number.parse::<u64>().ok().and_then(|number| number.checked_mul(factor));
    match millis.map(Duration::from_millis) {
        Some(duration) if duration <= MAX_DURATION => Ok(duration),
        _ if number.is_empty() => Err(format!("{text:?} has no number: write for example 5s")),
        _ => Err(format!("{text:?} is longer than a day")),
    }
}

/// `--memory`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryArg {
    /// As it was written.
    pub config: MemoryConfig,
    /// What it means.
    pub memory: Memory,
}

impl FromStr for MemoryArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::from_words(text)
    }
}

impl Pairs for MemoryArg {
    const KEYS: &[&str] =
        &["size", "max", "high", "low", "min", "swap", "store", "vmm", "track", "ageing", "proactive", "shares"];

    fn from_pairs<'p>(pairs: impl Iterator<Item = (&'p str, &'p str)>) -> Result<Self, PairError> {
        let (mut size, mut config) = (None, MemoryConfig::default());
        each_pair(pairs, Self::KEYS, |key, value| {
            let place = match key {
                "size" => {
                    size = Some(ram(value)?);
                    return Ok(());
                }
                "track" => {
                    config.track = Some(on_off(value)?);
                    return Ok(());
                }
                "ageing" => {
                    config.ageing_s = Some(if value == "off" { 0 } else { whole_seconds(value)? });
                    return Ok(());
                }
                "proactive" => {
                    config.proactive = Some(on_off(value)?);
                    return Ok(());
                }
                "shares" => {
                    config.shares = Some(value.parse().map_err(|_| format!("{value:?} is not a whole number"))?);
                    return Ok(());
                }
                "max" => &mut config.max_bytes,
                "high" => &mut config.high_bytes,
                "low" => &mut config.low_bytes,
                "min" => &mut config.min_bytes,
                "swap" => &mut config.swap_max_bytes,
                "store" => &mut config.store_max_bytes,
                _ => &mut config.vmm_max_bytes,
            };
            *place = Some(limit(value)?.as_bytes());
            Ok(())
        })?;
        config.size_bytes = size.ok_or("size is missing: write for example size=1G".to_owned())?.bytes();
        let memory = config.check().map_err(|refusal| refusal.message)?;
        Ok(Self { config, memory })
    }
}

/// A time that has to be whole seconds.
fn whole_seconds(value: &str) -> Result<u32, String> {
    let time = duration(value)?;
    if time.subsec_millis() != 0 {
        return Err(format!("{value:?} is not a whole number of seconds"));
    }
    u32::try_from(time.as_secs()).map_err(|error| error.to_string())
}

/// `--balloon`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BalloonArg(pub BalloonConfig);

impl FromStr for BalloonArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::from_words(text)
    }
}

impl Pairs for BalloonArg {
    const KEYS: &[&str] = &["free_page_reporting", "deflate_on_oom", "stats_interval"];

    fn from_pairs<'p>(pairs: impl Iterator<Item = (&'p str, &'p str)>) -> Result<Self, PairError> {
        let mut arg = BalloonConfig::default();
        each_pair(pairs, Self::KEYS, |key, value| {
            match key {
                "deflate_on_oom" => arg.deflate_on_oom = on_off(value)?,
                "stats_interval" => {
                    arg.stats_interval_s = whole_seconds(value)?;
                }
                _ => arg.free_page_reporting = on_off(value)?,
            }
            Ok(())
        })?;
        Ok(Self(arg))
    }
}

/// `--oom`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OomArg(pub OomPolicy);

impl FromStr for OomArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::from_words(text)
    }
}

impl Pairs for OomArg {
    const KEYS: &[&str] = &["action", "priority", "preference", "deadline"];

    fn from_pairs<'p>(pairs: impl Iterator<Item = (&'p str, &'p str)>) -> Result<Self, PairError> {
        let mut policy = OomPolicy::default();
        each_pair(pairs, Self::KEYS, |key, value| {
            match key {
                "action" => {
                    policy.action = match value {
                        "pause" => OomAction::Pause,
                        "kill" => OomAction::Kill,
                        _ => return Err(format!("{value:?} is neither pause nor kill")),
                    };
                }
                "preference" => {
                    policy.preference = match value {
                        "none" => OomPreference::None,
                        "avoid" => OomPreference::Avoid,
                        "omit" => OomPreference::Omit,
                        _ => return Err(format!("{value:?} is none of none, avoid and omit")),
                    };
                }
                "priority" => {
                    policy.priority = value.parse().map_err(|_| format!("{value:?} is not a whole number"))?;
                }
                _ => policy.deadline = scaled(duration(value)?),
            }
            Ok(())
        })?;
        Ok(Self(policy))
    }
}

/// A name that a VM can have.
///
/// # Errors
/// A sentence that says what a name is made of.
pub fn name(text: &str) -> Result<String, String> {
    let mut tree = Tree::new(Limit::Max);
    tree.add(tree.root(), text).map_err(|error| error.to_string())?;
    Ok(text.to_owned())
}

/// The path of a group.
///
/// # Errors
/// A sentence that says what a path looks like.
pub fn group_path(text: &str) -> Result<String, String> {
    groups::path(text).map_err(|refusal| refusal.message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory(text: &str) -> Result<MemoryArg, String> {
        text.parse()
    }

    #[test]
    fn memory_is_read() {
        let arg = memory("size=1G,max=512M,min=64M").unwrap();
        assert_eq!(arg.memory.size, Pages::from_mib(1024));
        assert_eq!(arg.memory.limits.max, Some(Limit::Pages(Pages::from_mib(512))));
        assert_eq!(arg.memory.limits.high, None);
        assert!(arg.memory.accounting);
        assert!(!memory("size=1G").unwrap().memory.accounting);
        assert!(!memory("size=1G,max=max").unwrap().memory.accounting);
        assert!(memory("size=1G,track=on").unwrap().memory.accounting);
        assert!(memory("size=1G,min=1M").unwrap().memory.accounting);
        // A limit above the size is no contradiction: overhead counts too.
        assert!(memory("size=1G,max=2G").is_ok());
    }

    #[test]
    fn what_is_wrong_with_memory_is_said() {
        for (text, part) in [
            ("max=512M", "size is missing"),
            ("size=0", "too small"),
            ("size=max", "size: max is not possible"),
            (
                "size=1000",
                "size: 1000 bytes is not a multiple of the page size 4096: did you mean 1000M, which is 1048576000?",
            ),
            ("size=5000", "write 4096, the next smaller one"),
            ("size=-1", "write for example size=512M"),
            ("size=1G,max=-1", "max: \"-1\" is negative: for no limit write max"),
            ("size=1G,size=2G", "given twice"),
            ("size=1G,limit=5M", "no key \"limit\"; the keys are size, max"),
            ("size=1G,max", "\"max\" is not KEY=VALUE"),
            ("size=1G,max=50%", "max: \"50%\" is a percentage"),
            ("size=1G,max=64M,min=128M", "memory.min 128M would be above memory.max 64M"),
            ("size=1G,max=64M,high=65M", "memory.high"),
            ("size=1G,max=64M,track=off", "contradicts"),
            ("size=1G,track=yes", "neither on nor off"),
            ("size=1T,size", "not KEY=VALUE"),
            ("size=4K", "at least 2 MiB"),
            ("size=17T", "too large"),
            ("", "not KEY=VALUE"),
        ] {
            let error = memory(text).expect_err(text);
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn durations_are_read() {
        assert_eq!(duration("5s"), Ok(Duration::from_secs(5)));
        assert_eq!(duration("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(duration("2m"), Ok(Duration::from_secs(120)));
        for text in ["", "5", "s", "-5s", "1.5s", "5 s", "99999999999999999999s", "25h"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn oom_and_balloon_are_read() {
        let OomArg(policy) = "action=kill,priority=-3,preference=omit,deadline=2s".parse().unwrap();
        assert_eq!(policy.action, OomAction::Kill);
        assert_eq!(policy.priority, -3);
        assert_eq!(policy.preference, OomPreference::Omit);
        assert_eq!(policy.deadline, scaled(Duration::from_secs(2)));
        assert!("action=stop".parse::<OomArg>().is_err());
        let balloon: BalloonArg = "deflate_on_oom=on,free_page_reporting=on,stats_interval=0s".parse().unwrap();
        let expected = BalloonConfig { deflate_on_oom: true, free_page_reporting: true, stats_interval_s: 0 };
        assert_eq!(balloon, BalloonArg(expected));
        assert!("stats_interval=500ms".parse::<BalloonArg>().is_err());
        assert!("free_page_reporting=1".parse::<BalloonArg>().is_err());
    }

    #[test]
    fn names_are_checked() {
        assert!(name("web-1.a_b").is_ok());
        for text in ["", "../x", "-a", "a/b", "a b"] {
            assert!(name(text).is_err(), "{text}");
        }
    }
}
