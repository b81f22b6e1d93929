//! A VM as the command line describes it: the options that `run` and `create` share.

use std::path::{Path, PathBuf};

use super::Failure;
use super::options::{BalloonArg, MemoryArg, OomArg};
use crate::controller::config::{MAX_CPUS, OomConfig, VmConfig};

/// The options that describe a VM.
#[derive(Debug, clap::Args)]
pub struct VmArgs {
    /// Guest RAM and limits: size=1G,max=512M,high=448M,low=128M,min=64M,swap=1G,vmm=32M,track=on|off
    #[arg(long, value_name = "SIZES", value_parser = str::parse::<MemoryArg>)]
    pub memory: MemoryArg,
    /// The balloon: deflate_on_oom=on|off,stats_interval=1s
    #[arg(long, value_name = "WORDS", value_parser = str::parse::<BalloonArg>)]
    balloon: Option<BalloonArg>,
    /// For a VM held at its limit too long: action=pause|kill,deadline=5s,priority=N,preference=none|avoid|omit
    #[arg(long, value_name = "WORDS", value_parser = str::parse::<OomArg>)]
    oom: Option<OomArg>,
    /// Kernel: bzImage, ELF with a PVH note, or a flat payload
    #[arg(long, value_name = "FILE")]
    kernel: PathBuf,
    /// Initial ramdisk
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// Kernel command line
    #[arg(long, value_name = "TEXT", default_value = "", allow_hyphen_values = true)]
    cmdline: String,
    /// Number of vCPUs
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = cpus)]
    cpus: u32,
    /// Offer the ports of freestanding payloads: exit, wait and print
    #[arg(long)]
    debug_port: bool,
}

/// A number of vCPUs.
fn cpus(text: &str) -> Result<u32, String> {
    let wrong = || format!("{text:?} is not possible: write a number from 1 to {MAX_CPUS}");
    text.parse().ok().filter(|cpus| (1..=MAX_CPUS).contains(cpus)).ok_or_else(wrong)
}

impl VmArgs {
    /// The same as a description that the controller understands.
    pub fn config(&self) -> VmConfig {
        VmConfig {
            kernel: self.kernel.clone(),
            initrd: self.initrd.clone(),
            cmdline: self.cmdline.clone(),
            group: "/".to_owned(),
            cpus: self.cpus,
            memory: self.memory.config,
            balloon: self.balloon.unwrap_or_default().0,
            oom: self.oom.map_or_else(OomConfig::default, |OomArg(policy)| policy.into()),
            debug_port: self.debug_port,
        }
    }

    /// The same for a controller with another working directory.
    ///
    /// # Errors
    /// When there is no working directory, or a path is empty.
    pub fn absolute_config(&self) -> Result<VmConfig, Failure> {
        let absolute = |path: &Path| {
            std::path::absolute(path).map_err(|error| Failure::error(format!("{}: {error}", path.display())))
        };
        let mut config = self.config();
        config.kernel = absolute(&config.kernel)?;
        config.initrd = config.initrd.as_deref().map(absolute).transpose()?;
        Ok(config)
    }
}
