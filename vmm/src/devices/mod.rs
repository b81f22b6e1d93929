//! Devices.

pub mod mmio;
