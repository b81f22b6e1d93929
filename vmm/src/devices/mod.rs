//! Devices: the buses that they sit on, the serial port, the ports for payloads, power, and the balloon behind its
//! virtio-mmio registers.

pub mod balloon;
pub mod bus;
pub mod console;
pub mod debug_port;
pub mod mmio;
pub mod power;
pub mod serial;
