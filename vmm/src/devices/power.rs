//! The power button, turning off and resetting: the ACPI registers of a hardware-reduced platform, and the keyboard controller's reset.
//!
//! ACPI 6.4, 4.8.3.7: writing the sleep type with the enable bit to the sleep control register enters that state. The
//! DSDT names type [`S5_TYPE`] for soft-off and offers no other. The FADT names the reset register and its value.

use std::sync::atomic::{AtomicBool, Ordering};

use vmm_sys_util::eventfd::EventFd;

use super::bus::{BusDevice, Effect};
use crate::worker::protocol::ExitReason;

/// Offset of the reset register.
pub const RESET: u64 = 0;
/// Offset of the sleep control register.
pub const SLEEP_CONTROL: u64 = 1;
/// Offset of the sleep status register.
pub const SLEEP_STATUS: u64 = 2;
/// Number of ports.
pub const PORTS: u64 = 3;
/// What to write to the reset register.
pub const RESET_VALUE: u8 = 1;
/// The sleep type that turns the VM off, also in the DSDT's `_S5`.
pub const S5_TYPE: u8 = 5;

const SLEEP_ENABLE: u8 = 1 << 5;
const SLEEP_TYPE_SHIFT: u8 = 2;

/// The button by which somebody asks the guest to turn itself off. A guest with ACPI is interrupted; one without looks at
/// the debug port ([`super::debug_port`]).
#[derive(Debug)]
pub struct PowerButton {
    pressed: AtomicBool,
    line: EventFd,
}

impl PowerButton {
    /// A button that interrupts by `line`.
    pub fn new(line: EventFd) -> Self {
        Self { pressed: AtomicBool::new(false), line }
    }

    /// Presses it.
    pub fn press(&self) {
        self.pressed.store(true, Ordering::Relaxed);
        // It fails only when the counter is full, and then the interrupt is pending anyway.
        let _ = self.line.write(1);
    }

    /// Whether it was ever pressed.
    pub fn was_pressed(&self) -> bool {
        self.pressed.load(Ordering::Relaxed)
    }
}

/// The ACPI registers.
#[derive(Debug, Default)]
pub struct AcpiPower;

impl BusDevice for AcpiPower {
    /// All read as zero: nothing is pending, and in particular the guest was not woken.
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        match (offset, data) {
            (RESET, [RESET_VALUE, ..]) => Effect::Exit(ExitReason::Reset),
            (SLEEP_CONTROL, [value, ..]) if *value == S5_TYPE << SLEEP_TYPE_SHIFT | SLEEP_ENABLE => {
                Effect::Exit(ExitReason::PowerOff)
            }
            _ => Effect::None,
        }
    }
}

/// The command port of a keyboard controller that has nothing but the reset line.
#[derive(Debug, Default)]
pub struct I8042Reset;

/// "Pulse output line 0", which is the CPU's reset.
const PULSE_RESET: u8 = 0xfe;

impl BusDevice for I8042Reset {
    /// The status: both buffers empty, so that a guest does not wait before it writes.
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) -> Effect {
        if data.first() == Some(&PULSE_RESET) { Effect::Exit(ExitReason::Reset) } else { Effect::None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_button_interrupts_each_time_and_remembers() {
        let line = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let button = PowerButton::new(line.try_clone().unwrap());
        assert!(!button.was_pressed() && line.read().is_err());
        button.press();
        button.press();
        assert!(button.was_pressed());
        assert_eq!(line.read().unwrap(), 2);
    }

    #[test]
    fn only_the_documented_writes_end_the_vm() {
        let off = S5_TYPE << 2 | 0x20;
        for offset in 0..PORTS {
            for value in 0..=255 {
                let want = match (offset, value) {
                    (RESET, RESET_VALUE) => Effect::Exit(ExitReason::Reset),
                    (SLEEP_CONTROL, v) if v == off => Effect::Exit(ExitReason::PowerOff),
                    _ => Effect::None,
                };
                assert_eq!(AcpiPower.write(offset, &[value]), want);
                let reset = if value == 0xfe { Effect::Exit(ExitReason::Reset) } else { Effect::None };
                assert_eq!(I8042Reset.write(0, &[value]), reset);
            }
        }
    }
}
