//! Devices.

pub mod balloon;
pub mod mmio;
