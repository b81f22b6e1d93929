//! Linux guests. They need a KVM that runs a kernel at CPL 0, so `scripts/test` runs this binary in the nested rig where
//! the machine's own KVM does not.

mod cost;
mod fleet;
mod ladder;
mod reporting;
mod single;

const MIB: u64 = 1 << 20;

/// What every Linux guest here is told.
const CMDLINE: &str = "quiet panic=-1 pci=off";
