//! States, the transitions between them, and the bits of a record.

/// Where a page is in its life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum FrameState {
    /// Never touched or given back: no memory, no charge, reads as zeroes.
    #[default]
    Absent = 0,
    /// Mapped where the guest uses it.
    Active = 1,
    /// Moved to the stage; contents kept, still charged.
    Idle = 2,
    /// In the store; charged to swap instead of memory.
    Swapped = 3,
    /// The guest gave it to the balloon.
    Ballooned = 4,
    /// Claimed: on its way between RAM and stage.
    Moving = 5,
    /// Claimed: on its way from the stage to the store.
    Evicting = 6,
    /// Claimed: its memory is being given back to the host.
    Discarding = 7,
}

impl FrameState {
    /// All states, in the order of their numbers.
    pub const ALL: [FrameState; 8] = [
        FrameState::Absent,
        FrameState::Active,
        FrameState::Idle,
        FrameState::Swapped,
        FrameState::Ballooned,
        FrameState::Moving,
        FrameState::Evicting,
        FrameState::Discarding,
    ];

    /// Whether a page may go from this state to `next`. Staying is no transition.
    pub const fn can_become(self, next: FrameState) -> bool {
        use FrameState::{Absent, Active, Ballooned, Discarding, Evicting, Idle, Moving, Swapped};
        match self {
            // Nothing is there: the owner fills it, or the guest gives away what it never had.
            Absent => match next {
                Active | Ballooned => true,
                Absent | Idle | Swapped | Moving | Evicting | Discarding => false,
            },
            // Every way out of present memory goes through a claim.
            Active => match next {
                Moving | Discarding => true,
                Absent | Active | Idle | Swapped | Ballooned | Evicting => false,
            },
            Idle => match next {
                Moving | Evicting | Discarding => true,
                Absent | Active | Idle | Swapped | Ballooned => false,
            },
            // The copy in the store is the owner's own memory: no system call, so no claim.
            Swapped => match next {
                Active | Absent | Ballooned => true,
                Idle | Swapped | Moving | Evicting | Discarding => false,
            },
            // Deflated, or touched without a word.
            Ballooned => match next {
                Absent | Active => true,
                Idle | Swapped | Ballooned | Moving | Evicting | Discarding => false,
            },
            // Either direction may fail and leave the page where it was.
            Moving => match next {
                Active | Idle => true,
                Absent | Swapped | Ballooned | Moving | Evicting | Discarding => false,
            },
            Evicting => match next {
                Swapped | Idle => true,
                Absent | Active | Ballooned | Moving | Evicting | Discarding => false,
            },
            // Done for the guest (ABSENT) or for the balloon, or failed and back.
            Discarding => match next {
                Absent | Ballooned | Active | Idle => true,
                Swapped | Moving | Evicting | Discarding => false,
            },
        }
    }

    /// True while a page in this state is charged to memory. A claim keeps the charge until its result is known.
    pub const fn is_charged(self) -> bool {
        match self {
            FrameState::Active
            | FrameState::Idle
            | FrameState::Moving
            | FrameState::Evicting
            | FrameState::Discarding => true,
            FrameState::Absent | FrameState::Swapped | FrameState::Ballooned => false,
        }
    }

    /// True while a system call is under way on the page, so that nobody else may act on it.
    pub const fn is_claim(self) -> bool {
        match self {
            FrameState::Moving | FrameState::Evicting | FrameState::Discarding => true,
            FrameState::Absent
            | FrameState::Active
            | FrameState::Idle
            | FrameState::Swapped
            | FrameState::Ballooned => false,
        }
    }

    /// The state with number `bits & 7`.
    pub(super) const fn from_bits(bits: u8) -> FrameState {
        FrameState::ALL[(bits & record::STATE) as usize]
    }
}

/// A transition that does not exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("page {index} is {from:?} and cannot become {to:?}")]
pub struct BadTransition {
    /// Index of the page.
    pub index: usize,
    /// Its state, unchanged.
    pub from: FrameState,
    /// The state that was refused.
    pub to: FrameState,
}

/// The bits of a record's first byte.
pub(super) mod record {
    /// The state.
    pub const STATE: u8 = 0b0000_0111;
    /// With MOVING: the page was IDLE before the claim, so its way back to ACTIVE is a refault.
    pub const FROM_IDLE: u8 = 1 << 3;
    /// Records with the same key make every transition alike.
    pub const KEY: u8 = STATE | FROM_IDLE;
    /// A fault waits for the page.
    pub const WANTED: u8 = 1 << 4;
    /// Part of a huge page of the host.
    pub const HUGE: u8 = 1 << 5;
    /// Touched since a scan last came by. Of a whole block the block's summary has it.
    pub const REFERENCED: u8 = 1 << 6;
    /// In use by somebody who has its address.
    pub const PINNED: u8 = 1 << 7;
}

/// What a transition does to a record.
#[derive(Clone, Copy, Debug)]
pub(super) struct Step {
    /// Bits that stay.
    pub keep: u8,
    /// Bits that are set.
    pub set: u8,
    /// The generation leaves the ages: a charge ends, or a new generation takes the old one's place.
    pub leaves: bool,
    /// The page gets the current generation: a charge begins, or the page was touched.
    pub stamped: bool,
    /// A page that had been put aside was touched.
    pub refault: bool,
}

impl Step {
    /// The step of a record with these bits to `to`.
    #[inline]
    pub fn of(bits: u8, to: FrameState) -> &'static Step {
        static STEPS: [[Step; FrameState::ALL.len()]; record::KEY as usize + 1] = Step::all();
        &STEPS[(bits & record::KEY) as usize][to as usize]
    }

    /// The steps from each key to each state.
    const fn all() -> [[Step; FrameState::ALL.len()]; record::KEY as usize + 1] {
        let mut steps = [[Step::new(0, FrameState::Absent); FrameState::ALL.len()]; record::KEY as usize + 1];
        let mut n = 0;
        while n < steps.len() * FrameState::ALL.len() {
            let (key, to) = (n / FrameState::ALL.len(), n % FrameState::ALL.len());
            steps[key][to] = Step::new(key as u8, FrameState::ALL[to]);
            n += 1;
        }
        steps
    }

    const fn new(key: u8, to: FrameState) -> Step {
        let from = FrameState::from_bits(key);
        let back = matches!(from, FrameState::Moving) && key & record::FROM_IDLE != 0;
        let refault = matches!(to, FrameState::Active) && (matches!(from, FrameState::Swapped) || back);
        let stamped = to.is_charged() && (refault || !from.is_charged());
        let leaves = from.is_charged() && (stamped || !to.is_charged());
        let origin = matches!(from, FrameState::Idle) && matches!(to, FrameState::Moving);
        Step {
            keep: !record::KEY & if stamped || leaves { !record::REFERENCED } else { u8::MAX },
            set: to as u8 | if origin { record::FROM_IDLE } else { 0 } | if refault { record::REFERENCED } else { 0 },
            leaves,
            stamped,
            refault,
        }
    }
}
