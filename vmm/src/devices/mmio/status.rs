//! The device status register (virtio 1.3, section 2.1).
//!
//! ```text
//!  Reset ──ACKNOWLEDGE──► Acknowledged ──DRIVER──► Driver ──FEATURES_OK──► FeaturesOk ──DRIVER_OK──► DriverOk
//!    ▲                                                     (if accepted)                                │
//!    └─────────────────────────── 0 written, from anywhere ─────────────────────────────────────────────┘
//! ```
//! FAILED (from the driver) and DEVICE_NEEDS_RESET (from the device) stop the device wherever it is, until a reset.

/// `ACKNOWLEDGE`: the guest has noticed the device.
pub const ACKNOWLEDGE: u32 = 1;
/// `DRIVER`: the guest has a driver for it.
pub const DRIVER: u32 = 2;
/// `DRIVER_OK`: the driver is ready; the device is live.
pub const DRIVER_OK: u32 = 4;
/// `FEATURES_OK`: features are negotiated.
pub const FEATURES_OK: u32 = 8;
/// `DEVICE_NEEDS_RESET`: the device cannot go on.
pub const NEEDS_RESET: u32 = 64;
/// `FAILED`: the driver has given up.
pub const FAILED: u32 = 128;

/// How far the driver has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Nothing yet, or after a reset.
    #[default]
    Reset,
    /// The guest has noticed the device.
    Acknowledged,
    /// It has a driver, which may choose features now.
    Driver,
    /// Features are fixed; queues may be set up now.
    FeaturesOk,
    /// The device is live; queues are fixed.
    DriverOk,
}

impl Phase {
    /// The phases after `Reset`, each with the bit that the driver sets to enter it.
    pub const STEPS: [(Phase, u32); 4] = [
        (Phase::Acknowledged, ACKNOWLEDGE),
        (Phase::Driver, DRIVER),
        (Phase::FeaturesOk, FEATURES_OK),
        (Phase::DriverOk, DRIVER_OK),
    ];

    /// Whether `next` may follow.
    pub fn can_become(self, next: Phase) -> bool {
        use Phase::*;
        match (self, next) {
            (Reset | Acknowledged | Driver | FeaturesOk | DriverOk, Reset) => true,
            (Reset, Acknowledged) | (Acknowledged, Driver) | (Driver, FeaturesOk) | (FeaturesOk, DriverOk) => true,
            (Reset, Driver | FeaturesOk | DriverOk) => false,
            (Acknowledged, Acknowledged | FeaturesOk | DriverOk) => false,
            (Driver, Acknowledged | Driver | DriverOk) => false,
            (FeaturesOk, Acknowledged | Driver | FeaturesOk) => false,
            (DriverOk, Acknowledged | Driver | FeaturesOk | DriverOk) => false,
        }
    }

    fn bits(self) -> u32 {
        Self::STEPS.iter().filter(|(phase, _)| *phase <= self).map(|(_, bit)| bit).sum()
    }
}

/// What a write to the register did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// 0 was written: the caller resets everything else.
    Reset,
    /// The phases entered, if any, end with this one.
    Phase(Phase),
    /// The write made a step that is not allowed now, or took a bit back; steps before that one were made.
    Refused,
}

/// The register.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceStatus {
    phase: Phase,
    failed: bool,
    needs_reset: bool,
}

impl DeviceStatus {
    /// How far the driver has come.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Whether queues may be processed and interrupts sent.
    pub fn is_live(&self) -> bool {
        self.phase == Phase::DriverOk && !self.failed && !self.needs_reset
    }

    /// What the driver reads.
    pub fn bits(&self) -> u32 {
        let flag = |on: bool, bit| if on { bit } else { 0 };
        self.phase.bits() | flag(self.failed, FAILED) | flag(self.needs_reset, NEEDS_RESET)
    }

    /// The device cannot go on. True if the driver has to be told by a configuration interrupt.
    pub fn set_needs_reset(&mut self) -> bool {
        let tell = self.is_live();
        self.needs_reset = true;
        tell
    }

    /// The driver writes `value`. `features_ok` says whether the features it chose are acceptable; otherwise the bit
    /// stays clear, which the driver sees when it reads it back.
    pub fn write(&mut self, value: u32, features_ok: impl FnOnce() -> bool) -> Change {
        if value == 0 {
            *self = DeviceStatus::default();
            return Change::Reset;
        }
        self.failed |= value & FAILED != 0;
        let kept = self.bits() & !NEEDS_RESET;
        let unknown = value & !(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | FAILED | NEEDS_RESET);
        if value & kept != kept || unknown != 0 {
            return Change::Refused;
        }
        let mut features_ok = Some(features_ok);
        for (next, bit) in Phase::STEPS {
            if value & bit == 0 || next <= self.phase {
                continue;
            }
            // Features are looked at only when it is their turn.
            let mut accept = || next != Phase::FeaturesOk || features_ok.take().is_some_and(|accept| accept());
            if !(self.phase.can_become(next) && accept()) {
                return Change::Refused;
            }
            self.phase = next;
        }
        Change::Phase(self.phase)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ALL: [Phase; 5] = [Phase::Reset, Phase::Acknowledged, Phase::Driver, Phase::FeaturesOk, Phase::DriverOk];

    fn at(phase: Phase) -> DeviceStatus {
        DeviceStatus { phase, ..DeviceStatus::default() }
    }

    #[test]
    fn only_the_next_phase_or_a_reset_follows() {
        for (i, from) in ALL.into_iter().enumerate() {
            for (j, to) in ALL.into_iter().enumerate() {
                assert_eq!(from.can_become(to), j == 0 || j == i + 1, "{from:?} to {to:?}");
            }
        }
    }

    #[test]
    fn the_usual_sequence() {
        let mut status = DeviceStatus::default();
        for (phase, bit) in Phase::STEPS {
            let value = status.bits() | bit;
            assert_eq!(status.write(value, || true), Change::Phase(phase));
            assert_eq!(status.bits(), value);
            assert_eq!(status.is_live(), phase == Phase::DriverOk);
        }
        assert_eq!(status.bits(), 0xf);
        assert_eq!(status.write(0, || unreachable!()), Change::Reset);
        assert_eq!(status.bits(), 0);
    }

    #[test]
    fn refused_features_leave_the_bit_clear_and_may_be_tried_again() {
        let mut status = at(Phase::Driver);
        assert_eq!(status.write(0xb, || false), Change::Refused);
        assert_eq!(status.bits(), 0x3);
        assert_eq!(status.write(0xf, || false), Change::Refused);
        assert_eq!(status.bits(), 0x3);
        assert_eq!(status.write(0xb, || true), Change::Phase(Phase::FeaturesOk));
    }

    #[test]
    fn steps_cannot_be_skipped_and_bits_not_taken_back() {
        assert_eq!(at(Phase::Reset).write(DRIVER, || true), Change::Refused);
        assert_eq!(at(Phase::Acknowledged).write(ACKNOWLEDGE | FEATURES_OK, || true), Change::Refused);
        assert_eq!(at(Phase::Driver).write(ACKNOWLEDGE | DRIVER | DRIVER_OK, || true), Change::Refused);
        assert_eq!(at(Phase::Reset).write(0x10, || true), Change::Refused);
        let mut live = at(Phase::DriverOk);
        for value in [0x7, 0xb, 0xd, 0xe, 1] {
            assert_eq!(live.write(value, || true), Change::Refused);
            assert_eq!(live, at(Phase::DriverOk));
        }
        assert_eq!(live.write(0xf, || true), Change::Phase(Phase::DriverOk));
    }

    #[test]
    fn failed_and_needs_reset_stop_the_device_until_a_reset() {
        let mut status = at(Phase::DriverOk);
        assert!(status.set_needs_reset());
        assert!(!status.set_needs_reset());
        assert_eq!((status.bits(), status.is_live()), (0x4f, false));
        // A driver may or may not write the bit back.
        assert_eq!(status.write(0xf, || true), Change::Phase(Phase::DriverOk));
        assert_eq!(status.write(0x4f | FAILED, || true), Change::Phase(Phase::DriverOk));
        assert_eq!(status.bits(), 0xcf);
        assert_eq!(status.write(0, || true), Change::Reset);
        assert_eq!(status, DeviceStatus::default());
        assert!(!at(Phase::FeaturesOk).set_needs_reset());
    }

    proptest! {
        #[test]
        fn live_only_with_features_accepted(
            writes in prop::collection::vec((any::<u32>(), any::<bool>(), 0u32..256), 0..40),
        ) {
            let mut status = DeviceStatus::default();
            let mut accepted = false;
            for (wild, accept, mild) in writes {
                let value = if wild % 8 == 0 { wild } else { mild };
                let mut asked = false;
                let change = status.write(value, || { asked = true; accept });
                accepted = (accepted || (asked && accept)) && change != Change::Reset;
                prop_assert_eq!(status.phase() >= Phase::FeaturesOk, accepted);
                prop_assert_eq!(status.bits() & !0xff, 0);
            }
        }
    }
}
