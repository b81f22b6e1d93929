//! One VM's process.

pub mod config;
pub mod protocol;
