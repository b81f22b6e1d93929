//! Tests of the transport with a device that only remembers, and memory that must not be touched.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use proptest::prelude::*;
use vm_memory::bitmap::BS;
use vm_memory::guest_memory::GuestMemorySliceIterator;
use vm_memory::{GuestMemoryError, GuestMemoryMmap, Permissions};

use super::status::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FAILED, FEATURES_OK, NEEDS_RESET};
use super::*;

const RAM: u64 = 1 << 20;
const EXTRA_QUEUE: u64 = 1;

/// Memory that may be looked up but not touched: all of these tests run on "vCPU threads".
struct Untouchable(GuestMemoryMmap);

impl GuestMemory for Untouchable {
    type PhysicalMemory = GuestMemoryMmap;
    type Bitmap = <GuestMemoryMmap as GuestMemory>::Bitmap;

    fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool {
        GuestMemory::check_range(&self.0, addr, count, access)
    }

    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        _: usize,
        _: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, BS<'a, Self::Bitmap>>, GuestMemoryError> {
        if addr.0 < u64::MAX {
            panic!("guest memory was touched");
        }
        GuestMemory::get_slices(&self.0, addr, 0, Permissions::Read)
    }
}

#[derive(Debug, Default)]
struct Memo {
    config: [u8; 8],
    resets: u32,
}

impl VirtioDevice for Memo {
    fn device_id(&self) -> u32 {
        5
    }
    fn offered_features(&self) -> u64 {
        F_VERSION_1 | EXTRA_QUEUE
    }
    fn queue_count(&self, features: u64) -> usize {
        2 + (features & EXTRA_QUEUE) as usize
    }
    fn queue_size(&self) -> u16 {
        128
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = offset.checked_add(i as u64).and_then(|at| self.config.get(at as usize)).copied().unwrap_or(0);
        }
    }
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        for (i, byte) in data.iter().enumerate() {
            if let Some(at) = offset.checked_add(i as u64).and_then(|at| self.config.get_mut(at as usize)) {
                *at = *byte;
            }
        }
    }
    fn reset(&mut self) {
        self.resets += 1;
    }
}

struct Line(Arc<AtomicU32>);

impl Interrupt for Line {
    fn trigger(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

struct Rig {
    mmio: MmioTransport<Memo, Untouchable>,
    interrupts: Arc<AtomicU32>,
}

impl Rig {
    fn new() -> Self {
        let mem = Untouchable(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM as usize)]).unwrap());
        let interrupts = Arc::new(AtomicU32::new(0));
        let mmio = MmioTransport::new(Memo::default(), mem, Box::new(Line(interrupts.clone()))).unwrap();
        Rig { mmio, interrupts }
    }

    /// A device whose driver has come as far as `status` with these features.
    fn at(features: u64, status: u32) -> Self {
        let mut rig = Rig::new();
        for bit in [ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK] {
            if bit == FEATURES_OK {
                rig.features(features);
            }
            if status & bit != 0 {
                rig.add_status(bit);
            }
        }
        assert_eq!(rig.read(STATUS), status);
        rig
    }

    fn live() -> Self {
        let mut rig = Rig::at(F_VERSION_1 | EXTRA_QUEUE, 0xb);
        for index in 0..3 {
            assert!(rig.set_up(index, 8, [0x1000, 0x2000, 0x3000]));
        }
        assert_eq!(rig.add_status(DRIVER_OK), MmioEvent::DriverOk);
        rig
    }

    fn read(&mut self, offset: u64) -> u32 {
        let mut data = [0xaa; 4];
        self.mmio.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&mut self, offset: u64, value: u32) -> MmioEvent {
        self.mmio.write(offset, &value.to_le_bytes())
    }

    fn add_status(&mut self, bit: u32) -> MmioEvent {
        let status = self.read(STATUS);
        self.write(STATUS, status | bit)
    }

    fn features(&mut self, features: u64) {
        for (sel, word) in [(1, features >> 32), (0, features)] {
            self.write(DRIVER_FEATURES_SEL, sel);
            self.write(DRIVER_FEATURES, word as u32);
        }
    }

    fn set_up(&mut self, index: u32, size: u32, [desc, driver, device]: [u64; 3]) -> bool {
        self.write(QUEUE_SEL, index);
        self.write(QUEUE_NUM, size);
        for (low, address) in [(QUEUE_DESC_LOW, desc), (QUEUE_DRIVER_LOW, driver), (QUEUE_DEVICE_LOW, device)] {
            self.write(low, address as u32);
            self.write(low + 4, (address >> 32) as u32);
        }
        self.write(QUEUE_READY, 1);
        self.read(QUEUE_READY) == 1
    }

    /// Runs `f` and says how many violations it was.
    fn violations<R>(&mut self, f: impl FnOnce(&mut Self) -> R) -> u64 {
        let before = self.mmio.violations();
        f(self);
        self.mmio.violations() - before
    }

    fn interrupts(&self) -> u32 {
        self.interrupts.load(Ordering::Relaxed)
    }
}

#[test]
fn the_device_introduces_itself() {
    let mut rig = Rig::new();
    assert_eq!(rig.read(MAGIC_VALUE), 0x7472_6976);
    assert_eq!((rig.read(VERSION), rig.read(DEVICE_ID), rig.read(STATUS)), (2, 5, 0));
    assert_eq!(rig.read(DEVICE_FEATURES), EXTRA_QUEUE as u32);
    rig.write(DEVICE_FEATURES_SEL, 1);
    assert_eq!(rig.read(DEVICE_FEATURES), 1);
    rig.write(DEVICE_FEATURES_SEL, 2);
    assert_eq!(rig.read(DEVICE_FEATURES), 0);
    rig.write(SHM_SEL, 0);
    for offset in (SHM_LEN_LOW..=SHM_BASE_HIGH).step_by(4) {
        assert_eq!(rig.read(offset), u32::MAX, "no shared memory");
    }
    assert_eq!(rig.mmio.violations(), 0);
}

#[test]
fn features_must_be_offered_and_include_version_1() {
    for bad in [0, EXTRA_QUEUE, F_VERSION_1 | 2, F_VERSION_1 | 1 << 63] {
        let mut rig = Rig::at(0, 0x3);
        rig.features(bad);
        assert_eq!(rig.violations(|rig| assert_eq!(rig.add_status(FEATURES_OK), MmioEvent::None)), 1, "{bad:#x}");
        assert_eq!((rig.read(STATUS), rig.mmio.features()), (0x3, 0));
        rig.features(F_VERSION_1);
        rig.add_status(FEATURES_OK);
        assert_eq!((rig.read(STATUS), rig.mmio.features()), (0xb, F_VERSION_1));
    }
}

#[test]
fn features_are_chosen_between_driver_and_features_ok() {
    for status in [0, 0x1, 0xb, 0xf] {
        let mut rig = Rig::at(F_VERSION_1, status);
        let chosen = rig.mmio.features();
        rig.write(DRIVER_FEATURES_SEL, 0);
        assert_eq!(rig.violations(|rig| assert_eq!(rig.write(DRIVER_FEATURES, 1), MmioEvent::None)), 1, "{status:#x}");
        assert_eq!(rig.mmio.features(), chosen);
    }
    let mut rig = Rig::at(F_VERSION_1, 0x3);
    rig.write(DRIVER_FEATURES_SEL, 2);
    assert_eq!(rig.violations(|rig| rig.write(DRIVER_FEATURES, 0)), 0);
    assert_eq!(rig.violations(|rig| rig.write(DRIVER_FEATURES, 1)), 1);
}

#[test]
fn queues_exist_by_the_features_chosen() {
    for (features, count) in [(F_VERSION_1, 2), (F_VERSION_1 | EXTRA_QUEUE, 3)] {
        let mut rig = Rig::at(features, 0xb);
        for index in [0, 1, 2, 3, u32::MAX] {
            rig.write(QUEUE_SEL, index);
            assert_eq!(rig.read(QUEUE_NUM_MAX), if index < count { 128 } else { 0 });
            assert_eq!(rig.set_up(index, 8, [0x1000, 0x2000, 0x3000]), index < count);
        }
    }
    assert_eq!(Rig::at(0, 0x3).read(QUEUE_NUM_MAX), 0);
}

#[test]
fn a_queue_is_ready_only_with_a_good_size_and_addresses_in_ram() {
    let good = [0x1000, 0x2000, 0x3000];
    let bad = [
        (0, good),
        (3, good),
        (256, good),
        (0x1_0008, good),
        (8, [0x1008, 0x2000, 0x3000]),
        (8, [0x1000, 0x2001, 0x3000]),
        (8, [0x1000, 0x2000, 0x3002]),
        (8, [RAM, 0x2000, 0x3000]),
        (8, [RAM - 0x70, 0x2000, 0x3000]),
        (8, [0x1000, RAM - 2, 0x3000]),
        (8, [0x1000, 0x2000, RAM - 4]),
        (8, [0x1000, 0x2000, u64::MAX - 3]),
        (8, [0x1000 | 1 << 32, 0x2000, 0x3000]),
    ];
    let mut rig = Rig::at(F_VERSION_1, 0xb);
    for (size, addresses) in bad {
        assert_eq!(rig.violations(|rig| assert!(!rig.set_up(0, size, addresses))), 1, "{size} {addresses:x?}");
    }
    assert!(rig.set_up(0, 8, good));
    rig.add_status(DRIVER_OK);
    let (_, queue, _) = rig.mmio.queue(0).unwrap();
    assert_eq!((queue.size(), queue.desc_table(), queue.avail_ring(), queue.used_ring()), (8, 0x1000, 0x2000, 0x3000));
    assert!(rig.mmio.queue(1).is_none(), "it was not set up");
}

#[test]
fn a_ready_queue_is_changed_only_after_it_was_stopped_and_a_live_one_never() {
    let mut rig = Rig::at(F_VERSION_1, 0xb);
    assert!(rig.set_up(0, 8, [0x1000, 0x2000, 0x3000]));
    assert_eq!(rig.violations(|rig| rig.write(QUEUE_NUM, 16)), 1);
    assert_eq!(rig.violations(|rig| rig.write(QUEUE_READY, 1)), 1);
    rig.write(QUEUE_READY, 0);
    assert!(rig.set_up(0, 16, [0x1000, 0x2000, 0x3000]));
    rig.add_status(DRIVER_OK);
    for offset in [QUEUE_NUM, QUEUE_DESC_LOW, QUEUE_DRIVER_HIGH, QUEUE_DEVICE_LOW] {
        assert_eq!(rig.violations(|rig| rig.write(offset, 0x4000)), 1);
    }
    assert_eq!(rig.mmio.queue(0).unwrap().1.size(), 16);
    rig.write(QUEUE_READY, 0);
    assert!(rig.read(QUEUE_READY) == 0 && rig.mmio.queue(0).is_none());
    assert_eq!(rig.violations(|rig| rig.write(QUEUE_READY, 1)), 1);
    assert_eq!(rig.read(QUEUE_READY), 0);
}

#[test]
fn queues_cannot_be_set_up_before_features_are_fixed() {
    for status in [0, 0x1, 0x3] {
        let mut rig = Rig::at(F_VERSION_1, status);
        assert!(!rig.set_up(0, 8, [0x1000, 0x2000, 0x3000]));
        assert!(rig.mmio.violations() > 0);
    }
}

#[test]
fn a_notification_names_a_queue_of_a_live_device() {
    let mut rig = Rig::live();
    assert_eq!(rig.write(QUEUE_NOTIFY, 1), MmioEvent::Notify(1));
    assert_eq!(rig.violations(|rig| assert_eq!(rig.write(QUEUE_NOTIFY, 3), MmioEvent::None)), 1);
    let mut early = Rig::at(F_VERSION_1, 0xb);
    assert_eq!(early.violations(|rig| assert_eq!(rig.write(QUEUE_NOTIFY, 1), MmioEvent::None)), 0);
}

#[test]
fn interrupts_say_why_until_they_are_acknowledged() {
    let mut rig = Rig::live();
    rig.mmio.signal_used();
    assert_eq!((rig.read(INTERRUPT_STATUS), rig.interrupts()), (INTERRUPT_USED, 1));
    rig.mmio.config_changed();
    assert_eq!((rig.read(INTERRUPT_STATUS), rig.interrupts()), (3, 2));
    rig.write(INTERRUPT_ACK, INTERRUPT_USED);
    assert_eq!(rig.read(INTERRUPT_STATUS), INTERRUPT_CONFIG);
    rig.write(INTERRUPT_ACK, u32::MAX);
    assert_eq!((rig.read(INTERRUPT_STATUS), rig.interrupts()), (0, 2));
}

#[test]
fn a_driver_that_is_not_ready_is_not_interrupted_but_sees_the_generation() {
    let mut rig = Rig::at(F_VERSION_1, 0xb);
    let before = rig.read(CONFIG_GENERATION);
    rig.mmio.config_changed();
    rig.mmio.signal_used();
    assert_eq!((rig.read(INTERRUPT_STATUS), rig.interrupts()), (0, 0));
    assert_eq!(rig.read(CONFIG_GENERATION), before + 1);
}

#[test]
fn configuration_space_takes_any_width() {
    let mut rig = Rig::new();
    assert_eq!(rig.mmio.write(CONFIG, &[1, 2, 3, 4, 5, 6, 7, 8]), MmioEvent::Config);
    assert_eq!(rig.mmio.write(CONFIG + 1, &[9]), MmioEvent::Config);
    let mut two = [0; 2];
    rig.mmio.read(CONFIG + 1, &mut two);
    assert_eq!((two, rig.read(CONFIG + 4), rig.read(CONFIG + 8)), ([9, 3], 0x0807_0605, 0));
}

#[test]
fn a_reset_forgets_everything_at_any_time() {
    let mut rig = Rig::live();
    rig.mmio.signal_used();
    assert_eq!(rig.write(STATUS, 0), MmioEvent::Reset);
    assert_eq!(rig.mmio.device().resets, 1);
    assert_eq!((rig.read(STATUS), rig.read(INTERRUPT_STATUS), rig.mmio.features()), (0, 0, 0));
    for index in 0..3 {
        assert!(rig.mmio.queue(index).is_none());
    }
    // Drivers stop the queues they had after a reset, and read the register back.
    rig.write(QUEUE_SEL, 1);
    assert_eq!(rig.violations(|rig| rig.write(QUEUE_READY, 0)), 0);
    assert_eq!(rig.read(QUEUE_READY), 0);
    // The next driver finds nothing of the last one's.
    for bit in [ACKNOWLEDGE, DRIVER] {
        rig.add_status(bit);
    }
    rig.features(F_VERSION_1);
    rig.add_status(FEATURES_OK);
    rig.write(QUEUE_SEL, 0);
    rig.write(QUEUE_READY, 1);
    rig.add_status(DRIVER_OK);
    assert_eq!((rig.read(STATUS), rig.mmio.features()), (0xf, F_VERSION_1));
    assert!(rig.mmio.queue(2).is_none());
    assert_eq!(rig.mmio.queue(0).map(|(_, queue, _)| (queue.next_avail(), queue.next_used())), Some((0, 0)));
}

#[test]
fn a_failed_or_broken_device_is_not_live() {
    let mut rig = Rig::live();
    rig.add_status(FAILED);
    assert!(!rig.mmio.is_live() && rig.mmio.queue(0).is_none());

    let mut rig = Rig::live();
    rig.mmio.require_reset();
    assert_eq!((rig.read(STATUS), rig.read(INTERRUPT_STATUS), rig.interrupts()), (0xf | NEEDS_RESET, 2, 1));
    assert!(rig.mmio.queue(0).is_none());
    rig.mmio.signal_used();
    assert_eq!(rig.interrupts(), 1);
    rig.write(STATUS, 0);
    assert_eq!(rig.read(STATUS), 0);
}

#[test]
fn odd_accesses_to_registers_are_counted_and_read_as_zero() {
    let mut rig = Rig::live();
    for (offset, len) in [(0, 1), (0, 2), (0, 8), (2, 4), (0x71, 4), (0xfd, 4), (0, 0)] {
        let mut data = vec![0xff; len];
        assert_eq!(rig.violations(|rig| rig.mmio.read(offset, &mut data)), 1, "{offset:#x}+{len}");
        assert!(data.iter().all(|byte| *byte == 0));
        assert_eq!(rig.violations(|rig| rig.mmio.write(offset, &data)), 1);
    }
    for offset in [DRIVER_FEATURES, QUEUE_NOTIFY, 0x0c0, 0x018] {
        assert_eq!(rig.violations(|rig| assert_eq!(rig.read(offset), 0)), 1);
    }
    for offset in [MAGIC_VALUE, INTERRUPT_STATUS, CONFIG_GENERATION, 0x0c0] {
        assert_eq!(rig.violations(|rig| rig.write(offset, 1)), 1);
    }
    assert!(rig.mmio.is_live());
}

fn plausible() -> impl Strategy<Value = (u64, u32)> {
    let register = prop::sample::select(vec![
        STATUS,
        STATUS,
        STATUS,
        STATUS,
        QUEUE_SEL,
        QUEUE_NUM,
        QUEUE_READY,
        QUEUE_READY,
        QUEUE_DESC_LOW,
        QUEUE_DESC_HIGH,
        QUEUE_DRIVER_LOW,
        QUEUE_DEVICE_LOW,
        DRIVER_FEATURES,
        DRIVER_FEATURES_SEL,
        QUEUE_NOTIFY,
        INTERRUPT_ACK,
    ]);
    let value = prop_oneof![
        6 => prop::sample::select(vec![0u32, 1, 2, 3, 8, 0xb, 0xf, 0x80, 0x1000]),
        1 => any::<u32>(),
    ];
    (prop_oneof![8 => register, 1 => 0u64..0x200], value)
}

proptest! {
    /// Whatever is written in whatever order: no panic, no touch of guest memory, and a queue is handed to the device
    /// only when the device is live with good features and the queue is good.
    #[test]
    fn registers_survive_anything(writes in prop::collection::vec(plausible(), 0..120)) {
        let mut rig = Rig::at(F_VERSION_1, 0x3);
        rig.features(F_VERSION_1);
        for (offset, value) in writes {
            rig.write(offset, value);
            rig.read(offset);
            let (live, features) = (rig.mmio.is_live(), rig.mmio.features());
            prop_assert!(!live || features & F_VERSION_1 != 0);
            for index in 0..4 {
                if let Some((_, queue, mem)) = rig.mmio.queue(index) {
                    prop_assert!(live && index < 3);
                    prop_assert!(queue.is_valid(mem));
                }
            }
        }
    }
}
