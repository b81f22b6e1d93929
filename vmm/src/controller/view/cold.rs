//! What the interface shows of a VM's cold pages.

use memcg_core::frame::Histogram;
use memcg_core::units::Pages;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::worker::protocol::Cold;

/// Which pages of a VM are not in use, and what has become of them. Amounts that only rise are since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ColdView {
    /// Memory in use in the last two generations, estimated from samples; absent as long as nothing is known.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub working_set_bytes: Option<u64>,
    /// The truth is at most this far away from it, in 95 of 100 cases.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub working_set_error_bytes: Option<u64>,
    /// Length of a generation in milliseconds; 0 while nothing is aged.
    pub generation_ms: u32,
    /// Resident memory by the time since it was last *seen* in use, the youngest first. Memory that the guest has mapped is
    /// seen only when it is moved aside, so what is old here may be in use: of all that is two generations old or more, at
    /// most what `working_set_bytes`, less its error, leaves of the whole is not.
    pub ages: [AgeView; AGES],
    /// Moved aside, to see whether it is touched.
    pub aged_bytes: u64,
    /// Of what was moved aside, touched again.
    pub returned_bytes: u64,
    /// Evicted.
    pub evicted_bytes: u64,
    /// Of what was evicted, touched again.
    pub refaulted_bytes: u64,
    /// Of what was evicted, brought back with a neighbour.
    pub read_around_bytes: u64,
    /// Of what was evicted, brought back before it was touched, after a pause.
    #[serde(default)]
    pub read_ahead_bytes: u64,
    /// Was to be evicted and stayed, because it does not shrink enough; a page that is tried again counts again.
    pub incompressible_bytes: u64,
    /// Of what is evicted now, in the swap file.
    pub file_bytes: u64,
    /// Read from the swap file.
    pub fetched_bytes: u64,
    /// Writes to the swap file that failed; what was to be written stayed in memory.
    pub failed_writes: u64,
}

/// Ages that are told apart.
pub const AGES: usize = Histogram::FROM.len();

/// Memory of one age.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AgeView {
    /// Least age in generations; the next entry has those above.
    pub generations: u16,
    /// Resident memory last seen in use so long ago; it may have been used since.
    pub resident_bytes: u64,
    /// What had this age as it was touched again, since the start of the VM.
    pub refaulted_bytes: u64,
}

impl From<Cold> for ColdView {
    fn from(cold: Cold) -> Self {
        let bytes = |pages| Pages(pages).bytes();
        let age = |at: usize| AgeView {
            generations: Histogram::FROM[at],
            resident_bytes: bytes(cold.ages[at]),
            refaulted_bytes: bytes(cold.refaults[at]),
        };
        Self {
            working_set_bytes: cold.working_set.map(bytes),
            working_set_error_bytes: cold.working_set.map(|_| bytes(cold.error)),
            generation_ms: cold.generation_ms,
            ages: std::array::from_fn(age),
            aged_bytes: bytes(cold.aged),
            returned_bytes: bytes(cold.returned),
            evicted_bytes: bytes(cold.evicted),
            refaulted_bytes: bytes(cold.refaulted),
            read_around_bytes: bytes(cold.read_around),
            read_ahead_bytes: bytes(cold.read_ahead),
            incompressible_bytes: bytes(cold.incompressible),
            file_bytes: bytes(cold.file),
            fetched_bytes: bytes(cold.fetched),
            failed_writes: cold.failed_writes,
        }
    }
}
