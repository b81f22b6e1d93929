//! Register offsets of virtio-mmio (virtio 1.3, section 4.2.2) and what the constant ones read as.

/// Reads as [`MAGIC`].
pub const MAGIC_VALUE: u64 = 0x000;
/// "virt", little-endian.
pub const MAGIC: u32 = 0x7472_6976;
/// Reads as 2: not the legacy interface.
pub const VERSION: u64 = 0x004;
/// Type of the device.
pub const DEVICE_ID: u64 = 0x008;
/// Reads as [`VENDOR`].
pub const VENDOR_ID: u64 = 0x00c;
/// "blst", little-endian; drivers do not care.
pub const VENDOR: u32 = 0x7473_6c62;
/// 32 of the features offered, those that `DEVICE_FEATURES_SEL` selects.
pub const DEVICE_FEATURES: u64 = 0x010;
/// Which 32 features.
pub const DEVICE_FEATURES_SEL: u64 = 0x014;
/// 32 of the features that the driver accepts.
pub const DRIVER_FEATURES: u64 = 0x020;
/// Which 32 features.
pub const DRIVER_FEATURES_SEL: u64 = 0x024;
/// The queue that the queue registers are about.
pub const QUEUE_SEL: u64 = 0x030;
/// Greatest queue size; 0 if there is no such queue.
pub const QUEUE_NUM_MAX: u64 = 0x034;
/// Queue size that the driver uses.
pub const QUEUE_NUM: u64 = 0x038;
/// 1 when the queue may be used.
pub const QUEUE_READY: u64 = 0x044;
/// The driver writes a queue's number here when there are new buffers.
pub const QUEUE_NOTIFY: u64 = 0x050;
/// Why there was an interrupt.
pub const INTERRUPT_STATUS: u64 = 0x060;
/// Bits of `INTERRUPT_STATUS` that have been seen to.
pub const INTERRUPT_ACK: u64 = 0x064;
/// Device status; writing 0 is a reset.
pub const STATUS: u64 = 0x070;
/// Address of the descriptor table.
pub const QUEUE_DESC_LOW: u64 = 0x080;
/// Upper half of it.
pub const QUEUE_DESC_HIGH: u64 = 0x084;
/// Address of the available ring ("driver area").
pub const QUEUE_DRIVER_LOW: u64 = 0x090;
/// Upper half of it.
pub const QUEUE_DRIVER_HIGH: u64 = 0x094;
/// Address of the used ring ("device area").
pub const QUEUE_DEVICE_LOW: u64 = 0x0a0;
/// Upper half of it.
pub const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
/// Selects a shared memory region; there are none.
pub const SHM_SEL: u64 = 0x0ac;
/// Length of the selected region: all ones says that there is none.
pub const SHM_LEN_LOW: u64 = 0x0b0;
/// Address of the selected region, upper half: the last of the four registers from `SHM_LEN_LOW`.
pub const SHM_BASE_HIGH: u64 = 0x0bc;
/// Changes whenever the device changes configuration space.
pub const CONFIG_GENERATION: u64 = 0x0fc;
/// First byte of configuration space.
pub const CONFIG: u64 = 0x100;

/// Bit of `INTERRUPT_STATUS`: the device has returned buffers.
pub const INTERRUPT_USED: u32 = 1;
/// Bit of `INTERRUPT_STATUS`: configuration space or the status has changed.
pub const INTERRUPT_CONFIG: u32 = 2;
