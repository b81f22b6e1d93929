//! The firmware tables: a hardware-reduced ACPI platform with local APICs, one I/O APIC, COM1 and virtio-mmio devices.
//!
//! Hardware-reduced means: no legacy timer, no legacy interrupt controller, no power management block; soft-off and
//! reset are two ports ([`crate::devices::power`]), and the power button is an interrupt of the *generic event device*
//! (ACPI 6.4, 5.6.9), whose method tells the button's driver. Device interrupts are edge-triggered and active high, because they
//! come from eventfds, which raise and lower the line at once.

use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml};

use super::layout;
use crate::devices::{power, serial};

const OEM: [u8; 6] = *b"BALLST";
const TABLE: [u8; 8] = *b"BALLASTV";
const REVISION: u32 = 1;
/// FADT: there is no VGA and no CMOS clock; without bit 1 there is no keyboard controller either.
const BOOT_ARCH_NO_VGA: u16 = 1 << 2;
const BOOT_ARCH_NO_RTC: u16 = 1 << 5;
/// What a power button is notified of (ACPI 6.4, table 5.152).
const PRESSED: u8 = 0x80;

/// What the tables describe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AcpiRequest {
    /// Number of vCPUs, 1 to [`layout::MAX_CPUS`].
    pub cpus: u32,
    /// Number of virtio-mmio devices, 0 to [`layout::MAX_VIRTIO`].
    pub virtio_devices: u32,
}

/// All tables as one block for the address [`layout::ACPI`]: the RSDP, then the others, each on 16 bytes.
pub fn tables(request: AcpiRequest) -> Vec<u8> {
    let mut block = Block { bytes: vec![0; Rsdp::len().next_multiple_of(16)] };
    let dsdt = block.append(&dsdt(request));
    let fadt = block.append(&fadt(dsdt));
    let madt = block.append(&madt(request.cpus));
    let mut xsdt = XSDT::new(OEM, TABLE, REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = block.append(&xsdt);
    let mut rsdp = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut rsdp);
    block.bytes[..rsdp.len()].copy_from_slice(&rsdp);
    debug_assert!(block.bytes.len() as u64 <= layout::ACPI_END - layout::ACPI);
    block.bytes
}

struct Block {
    bytes: Vec<u8>,
}

impl Block {
    /// Appends a table and returns its guest-physical address.
    fn append(&mut self, table: &dyn Aml) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(16), 0);
        let at = layout::ACPI + self.bytes.len() as u64;
        table.to_aml_bytes(&mut self.bytes);
        at
    }
}

fn port(offset: u64) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(layout::POWER_PORT) + offset)
}

fn fadt(dsdt: u64) -> impl Aml {
    let mut fadt = FADTBuilder::new(OEM, TABLE, REVISION)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless)
        .flag(Flags::HwReducedAcpi);
    fadt.iapc_boot_arch = (BOOT_ARCH_NO_VGA | BOOT_ARCH_NO_RTC).into();
    fadt.reset_reg = port(power::RESET);
    fadt.reset_value = power::RESET_VALUE;
    fadt.sleep_control_reg = port(power::SLEEP_CONTROL);
    fadt.sleep_status_reg = port(power::SLEEP_STATUS);
    fadt.finalize()
}

fn madt(cpus: u32) -> impl Aml {
    let mut madt = MADT::new(OEM, TABLE, REVISION, LocalInterruptController::Address(layout::LAPIC as u32));
    for id in 0..cpus as u8 {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    // The I/O APIC's id is its own number space to Linux, but keep it clear of the CPUs' ids all the same.
    madt.add_structure(IoApic::new(cpus as u8, layout::IOAPIC as u32, 0));
    madt
}

fn dsdt(request: AcpiRequest) -> impl Aml {
    let mut dsdt = Sdt::new(*b"DSDT", 36, 2, OEM, TABLE, REVISION);
    let (type_, zero) = (power::S5_TYPE, aml::ZERO);
    aml::Name::new("_S5_".into(), &aml::Package::new(vec![&type_, &zero, &zero, &zero])).to_aml_bytes(&mut dsdt);
    com1(&mut dsdt);
    power_button(&mut dsdt);
    for n in 0..request.virtio_devices {
        virtio(&mut dsdt, n);
    }
    dsdt
}

fn com1(dsdt: &mut Sdt) {
    aml::Device::new(
        "_SB_.COM1".into(),
        vec![
            &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0501")),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![
                    &aml::Interrupt::new(true, true, false, false, layout::COM1_GSI),
                    &aml::IO::new(layout::COM1, layout::COM1, 1, serial::PORTS as u8),
                ]),
            ),
        ],
    )
    .to_aml_bytes(dsdt);
}

/// The button, and the device that says when it is pressed. Nothing else raises that interrupt, so the method need not ask
/// which one it was.
fn power_button(dsdt: &mut Sdt) {
    let id = aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0C0C"));
    aml::Device::new("_SB_.PWRB".into(), vec![&id]).to_aml_bytes(dsdt);
    aml::Device::new(
        "_SB_.GED_".into(),
        vec![
            &aml::Name::new("_HID".into(), &"ACPI0013"),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![&aml::Interrupt::new(
                    true,
                    true,
                    false,
                    false,
                    layout::POWER_BUTTON_GSI,
                )]),
            ),
            &aml::Method::new(
                "_EVT".into(),
                1,
                true,
                vec![&aml::Notify::new(&aml::Path::new("\\_SB_.PWRB"), &PRESSED)],
            ),
        ],
    )
    .to_aml_bytes(dsdt);
}

fn virtio(dsdt: &mut Sdt, n: u32) {
    let path = format!("_SB_.VR{n:02}");
    aml::Device::new(
        path.as_str().into(),
        vec![
            &aml::Name::new("_HID".into(), &"LNRO0005"),
            &aml::Name::new("_UID".into(), &n),
            &aml::Name::new("_CCA".into(), &aml::ONE),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![
                    &aml::Memory32Fixed::new(true, layout::virtio_window(n) as u32, layout::VIRTIO_MMIO_SIZE as u32),
                    &aml::Interrupt::new(true, true, false, false, layout::virtio_gsi(n)),
                ]),
            ),
        ],
    )
    .to_aml_bytes(dsdt);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    /// The table at a guest-physical address, its checksum verified.
    fn table(block: &[u8], gpa: u64) -> &[u8] {
        let at = (gpa - layout::ACPI) as usize;
        let table = &block[at..at + u32_at(block, at + 4) as usize];
        assert_eq!(table.iter().fold(0u8, |sum, b| sum.wrapping_add(*b)), 0, "checksum of {:?}", &table[..4]);
        table
    }

    #[test]
    fn tables_hang_together() {
        for (cpus, virtio_devices) in [(1, 0), (2, 1), (layout::MAX_CPUS, layout::MAX_VIRTIO)] {
            let block = tables(AcpiRequest { cpus, virtio_devices });
            assert!(block.len() as u64 <= layout::ACPI_END - layout::ACPI);
            assert_eq!(&block[..8], b"RSD PTR ");
            assert_eq!(block[..36].iter().fold(0u8, |sum, b| sum.wrapping_add(*b)), 0);
            let xsdt = table(&block, u64_at(&block, 24));
            assert_eq!((&xsdt[..4], xsdt.len()), (b"XSDT".as_slice(), 36 + 2 * 8));
            let fadt = table(&block, u64_at(xsdt, 36));
            let madt = table(&block, u64_at(xsdt, 44));
            assert_eq!((&fadt[..4], &madt[..4]), (b"FACP".as_slice(), b"APIC".as_slice()));
            assert_eq!(madt.len(), 44 + 8 * cpus as usize + 12);
            assert_ne!(u32_at(fadt, 112) & 1 << 20, 0, "hardware-reduced");
            assert_eq!(u64_at(fadt, 120), u64::from(layout::POWER_PORT));
            let dsdt = table(&block, u64_at(fadt, 140));
            assert_eq!(&dsdt[..4], b"DSDT");
            let devices = dsdt.windows(8).filter(|w| *w == b"LNRO0005").count();
            assert_eq!(devices, virtio_devices as usize);
            // NotifyOp, the button's path from the root, and what it is told.
            let notify = b"\x86\\\x2e_SB_PWRB\x0a\x80";
            assert!(dsdt.windows(notify.len()).any(|w| w == notify) && dsdt.windows(8).any(|w| w == b"ACPI0013"));
        }
    }
}
