//! `ballast`: KVM guests under memory limits that hold.

pub mod api;
mod chain;
pub mod cli;
pub mod controller;
pub mod devices;
mod kernel;
pub mod machine;
pub mod memory;
pub mod sim;
pub mod worker;
