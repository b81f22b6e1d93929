//! Ports for freestanding payloads: end with a status, hear that one should, wait, and print a mark. Off unless asked for.
//!
//! | port | access | what happens |
//! | --- | --- | --- |
//! | 0x504 | 32-bit write | the VM ends with the low 8 bits as its status |
//! | 0x504 | 32-bit read | bit 0: somebody wants the guest to end (`ballast stop`); the others are 0 |
//! | 0x508 | 32-bit write | the instruction takes that many milliseconds: a payload at CPL 3 has no `HLT` |
//! | 0x50c | 32-bit write | `MARK <value> <nanoseconds of the host's monotonic clock>` on the console |
//!
//! The others read as zero. A waiting vCPU is in user space and can be stopped and ended like any other.

use std::sync::Arc;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

use super::bus::{BusDevice, Effect};
use super::console::Console;
use super::power::PowerButton;
use crate::worker::protocol::ExitReason;

/// Offset of the port that ends the VM.
pub const EXIT: u64 = 0;
/// Offset of the port that waits.
pub const WAIT: u64 = 4;
/// Offset of the port that prints a mark.
pub const MARK: u64 = 8;
/// Number of ports.
pub const PORTS: u64 = 12;

/// The device.
#[derive(Debug)]
pub struct DebugPort {
    console: Arc<Console>,
    button: Arc<PowerButton>,
}

impl DebugPort {
    /// Prints its marks on `console`, and says whether `button` was pressed.
    pub fn new(console: Arc<Console>, button: Arc<PowerButton>) -> Self {
        Self { console, button }
    }
}

impl BusDevice for DebugPort {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset == EXIT
            && let Some(first) = data.first_mut()
        {
            *first = self.button.was_pressed().into();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        // Narrow writes are taken as they are; that spares a payload the wide form for small numbers.
        let value = data.iter().take(4).rev().fold(0u32, |value, byte| value << 8 | u32::from(*byte));
        match offset {
            EXIT => Effect::Exit(ExitReason::Status(value as u8)),
            WAIT => Effect::Wait(Duration::from_millis(u64::from(value))),
            MARK => {
                let now = clock_gettime(ClockId::Monotonic);
                let ns = now.tv_sec as i128 * 1_000_000_000 + now.tv_nsec as i128;
                self.console.print(format!("MARK {value} {ns}\n").as_bytes());
                Effect::None
            }
            _ => Effect::None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::eventfd::EventFd;

    use crate::devices::console;

    #[test]
    fn each_port_does_its_job() {
        let memory = console::create().unwrap();
        let console = Arc::new(Console::new(&memory).unwrap());
        let button = Arc::new(PowerButton::new(EventFd::new(libc::EFD_NONBLOCK).unwrap()));
        let mut port = DebugPort::new(Arc::clone(&console), Arc::clone(&button));
        assert_eq!(port.write(EXIT, &0x107u32.to_le_bytes()), Effect::Exit(ExitReason::Status(7)));
        assert_eq!(port.write(EXIT, &[3]), Effect::Exit(ExitReason::Status(3)));
        assert_eq!(port.write(WAIT, &1500u32.to_le_bytes()), Effect::Wait(Duration::from_millis(1500)));
        assert_eq!(port.write(MARK, &42u32.to_le_bytes()), Effect::None);
        assert_eq!(port.write(5, &[1]), Effect::None);
        let mut read = |offset| {
            let mut data = [0xff; 4];
            port.read(offset, &mut data);
            u32::from_le_bytes(data)
        };
        assert_eq!((0..PORTS).map(&mut read).sum::<u32>(), 0);
        button.press();
        assert_eq!((read(EXIT), (1..PORTS).map(&mut read).sum::<u32>()), (1, 0));
        let printed = String::from_utf8(console::read(&memory).unwrap()).unwrap();
        let words: Vec<_> = printed.split_whitespace().collect();
        assert_eq!(words[..2], ["MARK", "42"]);
        assert!(words[2].parse::<u64>().unwrap() > 0 && printed.ends_with('\n'));
    }
}
