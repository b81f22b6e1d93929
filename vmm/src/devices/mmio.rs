//! virtio-mmio (virtio 1.3, section 4.2): the registers through which a driver finds and sets up a device.
//!
//! One [`MmioTransport`] is one device behind one mutex: the vCPU that reads or writes a register and the device
//! thread that works on the queues take turns. Register accesses are rare (notification is an ioeventfd, see
//! [`MmioTransport::write`]), and the device thread holds the lock for one batch at a time. The mutex is also what
//! makes a reset safe: the driver's write of 0 returns when no batch is running and none will.
//!
//! A vCPU thread never touches guest memory here: making a queue ready checks only that its addresses are RAM. All
//! that is read and written in a ring happens in the device thread.
//!
//! Nothing a driver writes is an error of the host: what the specification forbids is ignored and counted.

pub mod registers;
pub mod status;

#[cfg(test)]
mod tests;

use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemory};
use vmm_sys_util::eventfd::EventFd;

use registers::*;
use status::{Change, DeviceStatus, Phase};

/// `VIRTIO_F_VERSION_1`, without which a driver speaks the legacy interface that is not offered here.
const F_VERSION_1: u64 = 1 << 32;

/// What the transport needs of a device.
pub trait VirtioDevice {
    /// Number of the device type.
    fn device_id(&self) -> u32;
    /// Features to offer. The transport adds nothing.
    fn offered_features(&self) -> u64;
    /// How many queues there are when `features` are negotiated; no subset of the offer gives more than all of it.
    fn queue_count(&self, features: u64) -> usize;
    /// Greatest size of a queue, a power of two up to 32768.
    fn queue_size(&self) -> u16;
    /// Fills `data` from configuration space; what is not there reads as 0.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// Writes configuration space; what may not be written is ignored.
    fn write_config(&mut self, offset: u64, data: &[u8]);
    /// Forgets everything about queues and the driver.
    fn reset(&mut self);
}

/// A line to the guest's interrupt controller.
pub trait Interrupt: Send {
    /// Raises the interrupt once (an edge). Never blocks.
    fn trigger(&self);
}

impl Interrupt for EventFd {
    fn trigger(&self) {
        // Fails only when the counter is full, and then the interrupt is pending many times already.
        let _ = self.write(1);
    }
}

/// What the caller of [`MmioTransport::write`] has to pass on to the device thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MmioEvent {
    /// Nothing.
    None,
    /// There may be buffers in this queue.
    Notify(usize),
    /// The device is live. Drivers notify before that too, in vain: every queue deserves a look.
    DriverOk,
    /// The device was reset.
    Reset,
    /// The driver wrote to configuration space.
    Config,
}

/// One queue, as the driver sets it up and as the device uses it once it is ready.
#[derive(Debug)]
struct QueueSlot {
    size: u32,
    desc: u64,
    driver: u64,
    device: u64,
    queue: Queue,
}

impl QueueSlot {
    fn new(max_size: u16) -> Result<Self, virtio_queue::Error> {
        let queue = Queue::new(max_size)?;
        Ok(QueueSlot { size: u32::from(max_size), desc: 0, driver: 0, device: 0, queue })
    }

    fn reset(&mut self) {
        self.queue.reset();
        (self.size, self.desc, self.driver, self.device) = (u32::from(self.queue.max_size()), 0, 0, 0);
    }

    /// Makes the queue ready if size, alignment and addresses are good.
    fn make_ready<M: GuestMemory>(&mut self, mem: &M) -> bool {
        self.queue.reset();
        let size = u16::try_from(self.size).unwrap_or(0);
        let set = self.queue.try_set_size(size).is_ok()
            && self.queue.try_set_desc_table_address(GuestAddress(self.desc)).is_ok()
            && self.queue.try_set_avail_ring_address(GuestAddress(self.driver)).is_ok()
            && self.queue.try_set_used_ring_address(GuestAddress(self.device)).is_ok();
        self.queue.set_ready(set);
        // `is_valid` asks where RAM is; it does not touch it.
        let ready = set && self.queue.is_valid(mem);
        self.queue.set_ready(ready);
        ready
    }
}

/// A device with its registers.
pub struct MmioTransport<D, M> {
    device: D,
    mem: M,
    interrupt: Box<dyn Interrupt>,
    status: DeviceStatus,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    queues: Vec<QueueSlot>,
    interrupt_status: u32,
    config_generation: u32,
    violations: u64,
}

impl<D: std::fmt::Debug, M> std::fmt::Debug for MmioTransport<D, M> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MmioTransport")
            .field("device", &self.device)
            .field("status", &self.status)
            .field("driver_features", &self.driver_features)
            .field("queues", &self.queues)
            .finish_non_exhaustive()
    }
}

impl<D: VirtioDevice, M: GuestMemory> MmioTransport<D, M> {
    /// A device in reset whose rings live in `mem`.
    ///
    /// # Errors
    /// When the device's queue size is no power of two.
    pub fn new(device: D, mem: M, interrupt: Box<dyn Interrupt>) -> Result<Self, virtio_queue::Error> {
        let count = device.queue_count(device.offered_features());
        let queues = (0..count).map(|_| QueueSlot::new(device.queue_size())).collect::<Result<_, _>>()?;
        Ok(MmioTransport {
            device,
            mem,
            interrupt,
            status: DeviceStatus::default(),
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
            queues,
            interrupt_status: 0,
            config_generation: 0,
            violations: 0,
        })
    }

    /// The device.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// The device. After a change of its configuration space call [`Self::config_changed`].
    pub fn device_mut(&mut self) -> &mut D {
        &mut self.device
    }

    /// Whether the driver is ready: queues may be processed.
    pub fn is_live(&self) -> bool {
        self.status.is_live()
    }

    /// The features that are negotiated; 0 before FEATURES_OK.
    pub fn features(&self) -> u64 {
        if self.status.phase() >= Phase::FeaturesOk { self.driver_features } else { 0 }
    }

    /// Register accesses that the specification forbids, so far.
    pub fn violations(&self) -> u64 {
        self.violations
    }

    /// What is needed to process queue `index`, if the device is live and the queue ready.
    pub fn queue(&mut self, index: usize) -> Option<(&mut D, &mut Queue, &M)> {
        if !self.is_live() {
            return None;
        }
        let slot = self.queues.get_mut(index).filter(|slot| slot.queue.ready())?;
        Some((&mut self.device, &mut slot.queue, &self.mem))
    }

    /// Tells the driver that buffers were returned.
    pub fn signal_used(&mut self) {
        self.signal(INTERRUPT_USED);
    }

    /// The device has changed its configuration space: the driver is told, now or when it first looks.
    pub fn config_changed(&mut self) {
        self.config_generation = self.config_generation.wrapping_add(1);
        self.signal(INTERRUPT_CONFIG);
    }

    /// The device cannot go on before the driver resets it.
    pub fn require_reset(&mut self) {
        if self.status.set_needs_reset() {
            self.interrupt_status |= INTERRUPT_CONFIG;
            self.interrupt.trigger();
        }
    }

    /// A read by the guest, of any length at any offset.
    pub fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let Some(at) = offset.checked_sub(CONFIG) {
            return self.device.read_config(at, data);
        }
        match (<&mut [u8; 4]>::try_from(&mut *data), offset.is_multiple_of(4)) {
            (Ok(word), true) => *word = self.read_register(offset).to_le_bytes(),
            _ => {
                self.violations += 1;
                data.fill(0);
            }
        }
    }

    /// A write by the guest, of any length at any offset. A write to `QueueNotify` normally never gets here: an
    /// ioeventfd on that register with the queue's number as its datamatch serves it.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> MmioEvent {
        if let Some(at) = offset.checked_sub(CONFIG) {
            self.device.write_config(at, data);
            return MmioEvent::Config;
        }
        match (<[u8; 4]>::try_from(data), offset.is_multiple_of(4)) {
            (Ok(word), true) => self.write_register(offset, u32::from_le_bytes(word)),
            _ => self.violation(),
        }
    }

    fn read_register(&mut self, offset: u64) -> u32 {
        match offset {
            MAGIC_VALUE => MAGIC,
            VERSION => 2,
            DEVICE_ID => self.device.device_id(),
            VENDOR_ID => VENDOR,
            DEVICE_FEATURES => match self.device_features_sel {
                0 => self.device.offered_features() as u32,
                1 => (self.device.offered_features() >> 32) as u32,
                _ => 0,
            },
            QUEUE_NUM_MAX => self.selected().map_or(0, |slot| u32::from(slot.queue.max_size())),
            QUEUE_READY => self.selected().map_or(0, |slot| u32::from(slot.queue.ready())),
            INTERRUPT_STATUS => self.interrupt_status,
            STATUS => self.status.bits(),
            SHM_LEN_LOW..=SHM_BASE_HIGH => u32::MAX,
            CONFIG_GENERATION => self.config_generation,
            _ => {
                self.violations += 1;
                0
            }
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) -> MmioEvent {
        match offset {
            DEVICE_FEATURES_SEL => self.device_features_sel = value,
            DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            DRIVER_FEATURES => return self.write_features(value),
            QUEUE_SEL => self.queue_sel = value,
            QUEUE_NUM | QUEUE_DESC_LOW | QUEUE_DESC_HIGH | QUEUE_DRIVER_LOW | QUEUE_DRIVER_HIGH | QUEUE_DEVICE_LOW
            | QUEUE_DEVICE_HIGH => return self.configure_queue(offset, value),
            QUEUE_READY => return self.write_queue_ready(value),
            QUEUE_NOTIFY => return self.notify(value),
            INTERRUPT_ACK => self.interrupt_status &= !value,
            STATUS => return self.write_status(value),
            SHM_SEL => {}
            _ => return self.violation(),
        }
        MmioEvent::None
    }

    fn write_features(&mut self, value: u32) -> MmioEvent {
        // Features are chosen between DRIVER and FEATURES_OK and never change after that.
        if self.status.phase() != Phase::Driver {
            return self.violation();
        }
        let value = u64::from(value);
        match self.driver_features_sel {
            0 => self.driver_features = self.driver_features & !0xffff_ffff | value,
            1 => self.driver_features = self.driver_features & 0xffff_ffff | value << 32,
            _ if value == 0 => {}
            _ => return self.violation(),
        }
        MmioEvent::None
    }

    fn write_status(&mut self, value: u32) -> MmioEvent {
        let (chosen, offered) = (self.driver_features, self.device.offered_features());
        let was_live = self.is_live();
        match self.status.write(value, || chosen & !offered == 0 && chosen & F_VERSION_1 != 0) {
            Change::Reset => {
                self.reset();
                MmioEvent::Reset
            }
            Change::Phase(_) if self.is_live() && !was_live => MmioEvent::DriverOk,
            Change::Phase(_) => MmioEvent::None,
            Change::Refused => self.violation(),
        }
    }

    fn configure_queue(&mut self, offset: u64, value: u32) -> MmioEvent {
        // Which queues exist is known once features are fixed, and a live device relies on where they are.
        let fixed = self.status.phase() != Phase::FeaturesOk;
        let Some(slot) = self.selected().filter(|slot| !fixed && !slot.queue.ready()) else {
            return self.violation();
        };
        let low = |old: u64| old & !0xffff_ffff | u64::from(value);
        let high = |old: u64| old & 0xffff_ffff | u64::from(value) << 32;
        match offset {
            QUEUE_NUM => slot.size = value,
            QUEUE_DESC_LOW => slot.desc = low(slot.desc),
            QUEUE_DESC_HIGH => slot.desc = high(slot.desc),
            QUEUE_DRIVER_LOW => slot.driver = low(slot.driver),
            QUEUE_DRIVER_HIGH => slot.driver = high(slot.driver),
            QUEUE_DEVICE_LOW => slot.device = low(slot.device),
            QUEUE_DEVICE_HIGH => slot.device = high(slot.device),
            _ => return self.violation(),
        }
        MmioEvent::None
    }

    fn write_queue_ready(&mut self, value: u32) -> MmioEvent {
        let phase = self.status.phase();
        let index = self.queue_sel as usize;
        let count = self.queue_count();
        let slot = if index < count { self.queues.get_mut(index) } else { None };
        let done = match (slot, value) {
            // A queue may be stopped at any time, but a live device starts none.
            (Some(slot), 0) => {
                slot.queue.set_ready(false);
                true
            }
            (Some(slot), 1) if phase == Phase::FeaturesOk && !slot.queue.ready() => slot.make_ready(&self.mem),
            // Drivers clear the register of queues that are gone already.
            (None, 0) => true,
            _ => false,
        };
        if done { MmioEvent::None } else { self.violation() }
    }

    fn notify(&mut self, value: u32) -> MmioEvent {
        let index = value as usize;
        if index >= self.queue_count() {
            return self.violation();
        }
        // Too early is no violation in practice: Linux' balloon driver kicks its statistics queue before DRIVER_OK.
        if self.is_live() { MmioEvent::Notify(index) } else { MmioEvent::None }
    }

    fn reset(&mut self) {
        self.device_features_sel = 0;
        self.driver_features_sel = 0;
        self.driver_features = 0;
        self.queue_sel = 0;
        self.interrupt_status = 0;
        self.queues.iter_mut().for_each(QueueSlot::reset);
        self.device.reset();
    }

    /// Queues that exist with the negotiated features; none before.
    fn queue_count(&self) -> usize {
        if self.status.phase() < Phase::FeaturesOk {
            return 0;
        }
        self.device.queue_count(self.driver_features).min(self.queues.len())
    }

    fn selected(&mut self) -> Option<&mut QueueSlot> {
        let index = self.queue_sel as usize;
        if index < self.queue_count() { self.queues.get_mut(index) } else { None }
    }

    fn signal(&mut self, bit: u32) {
        // A driver that is not ready is not interrupted: it reads everything when it gets so far.
        if self.is_live() {
            self.interrupt_status |= bit;
            self.interrupt.trigger();
        }
    }

    fn violation(&mut self) -> MmioEvent {
        self.violations += 1;
        MmioEvent::None
    }
}
