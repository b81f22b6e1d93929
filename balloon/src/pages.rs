//! What the balloon needs of the owner of guest memory.

use std::io::ErrorKind;

use vm_memory::GuestMemoryError;

use crate::ranges::PageRange;

/// Not now: the operation would have to wait. Nothing is wrong; try again when told to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("guest memory is not available at the moment")]
pub struct WouldBlock;

/// The owner of guest memory, as far as the balloon is concerned.
///
/// The ranges are sorted, disjoint and not adjacent, but they come from the guest: whether they lie in RAM is for the
/// implementor to check, who ignores and counts what does not. The calls may be repeated for the same pages, by the
/// guest or after `WouldBlock`, and must then do no harm.
pub trait GuestPages {
    /// Discards what is in `ranges`. When it returns `Ok`, the host holds nothing for these pages, whatever state they
    /// were in, and their charges are returned. On `WouldBlock` any part may have been done; it is called again later
    /// for the same pages, and the guest does not get its buffer back before that.
    fn inflate(&mut self, ranges: &[PageRange]) -> Result<(), WouldBlock>;

    /// The guest does not use what is in `ranges`, and may write to it again as soon as it has its buffer back, without a
    /// word: until then, anything of it may be discarded, or nothing. What is discarded reads as zeroes afterwards.
    fn report(&mut self, ranges: &[PageRange]) -> Result<(), WouldBlock>;

    /// The guest takes these pages back. It does not touch them before this has returned `Ok`.
    fn deflate(&mut self, ranges: &[PageRange]) -> Result<(), WouldBlock>;
}

/// Whether an access to guest memory was refused only for the moment. Implementations of `vm_memory::GuestMemory` say
/// so with an I/O error of kind [`ErrorKind::WouldBlock`].
pub fn is_would_block(error: &GuestMemoryError) -> bool {
    matches!(error, GuestMemoryError::IOError(e) if e.kind() == ErrorKind::WouldBlock)
}
