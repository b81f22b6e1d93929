//! A VM as the command line describes it: the options that `run` and `create` share.

use std::path::{Path, PathBuf};

use super::Failure;
use super::file::VmFile;
use super::options::{BalloonArg, MemoryArg, OomArg};
use crate::controller::config::{MAX_CPUS, OomConfig, VmConfig};

/// The options that describe a VM.
#[derive(Debug, clap::Args)]
pub struct VmArgs {
    /// A file with the words of these options; those given here take their place
    #[arg(long, value_name = "FILE.toml")]
    config: Option<PathBuf>,
    /// Guest RAM and limits: size=1G,max=512M,high=448M,low=128M,min=64M,swap=1G,store=256M,vmm=32M,
    /// track=on|off,ageing=30s|off,proactive=on|off,shares=100
    #[arg(long, value_name = "SIZES", value_parser = str::parse::<MemoryArg>, required_unless_present = "config")]
    memory: Option<MemoryArg>,
    /// The balloon: free_page_reporting=on|off,deflate_on_oom=on|off,stats_interval=1s
    #[arg(long, value_name = "WORDS", value_parser = str::parse::<BalloonArg>)]
    balloon: Option<BalloonArg>,
    /// For a VM held at its limit too long: action=pause|kill,deadline=5s,priority=N,preference=none|avoid|omit
    #[arg(long, value_name = "WORDS", value_parser = str::parse::<OomArg>)]
    oom: Option<OomArg>,
    /// Kernel: bzImage, ELF with a PVH note, or a flat payload
    #[arg(long, value_name = "FILE", required_unless_present = "config")]
    kernel: Option<PathBuf>,
    /// Initial ramdisk
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// Directory for a file that takes evicted pages that do not shrink; without it they stay in memory
    #[arg(long, value_name = "DIR")]
    swap_dir: Option<PathBuf>,
    /// Kernel command line
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    cmdline: Option<String>,
    /// Number of vCPUs [default: 1]
    #[arg(long, value_name = "N", value_parser = cpus)]
    cpus: Option<u32>,
    /// Offer the ports of freestanding payloads: exit, wait and print
    #[arg(long)]
    debug_port: bool,
}

/// A number of vCPUs.
pub fn cpus(text: &str) -> Result<u32, String> {
    let wrong = || format!("{text:?} is not possible: write a number from 1 to {MAX_CPUS}");
    text.parse().ok().filter(|cpus| (1..=MAX_CPUS).contains(cpus)).ok_or_else(wrong)
}

impl VmArgs {
    /// The VM that is meant, and the name that its file gives it.
    ///
    /// # Errors
    /// When the file makes no sense, or something is missing.
    pub fn config(&self) -> Result<(Option<String>, VmConfig), Failure> {
        let file = self.config.as_deref().map(VmFile::read).transpose()?.unwrap_or_default();
        let missing = |what: &str| {
            let file = self.config.as_deref().unwrap_or(Path::new("")).display();
            Failure::usage(format!("there is no {what} in {file}: write it there, or give --{what}"))
        };
        let memory = self.memory.or(file.memory).ok_or_else(|| missing("memory"))?;
        let config = VmConfig {
            kernel: self.kernel.clone().or(file.kernel).ok_or_else(|| missing("kernel"))?,
            initrd: self.initrd.clone().or(file.initrd),
            swap_dir: self.swap_dir.clone().or(file.swap_dir),
            cmdline: self.cmdline.clone().or(file.cmdline).unwrap_or_default(),
            group: file.group.unwrap_or_else(|| "/".to_owned()),
            cpus: self.cpus.or(file.cpus).unwrap_or(1),
            memory: memory.config,
            balloon: self.balloon.or(file.balloon).unwrap_or_default().0,
            oom: self.oom.or(file.oom).map_or_else(OomConfig::default, |OomArg(policy)| policy.into()),
            debug_port: self.debug_port || file.debug_port.unwrap_or(false),
        };
        Ok((file.name, config))
    }

    /// The same for a controller with another working directory.
    ///
    /// # Errors
    /// As [`Self::config`]; when there is no working directory, or a path is empty.
    pub fn absolute_config(&self) -> Result<(Option<String>, VmConfig), Failure> {
        let absolute = |path: &Path| {
            std::path::absolute(path).map_err(|error| Failure::error(format!("{}: {error}", path.display())))
        };
        let (name, mut config) = self.config()?;
        config.kernel = absolute(&config.kernel)?;
        config.initrd = config.initrd.as_deref().map(absolute).transpose()?;
        config.swap_dir = config.swap_dir.as_deref().map(absolute).transpose()?;
        Ok((name, config))
    }
}
