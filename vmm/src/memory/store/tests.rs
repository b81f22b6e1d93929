//! The store against a map, its pages against the kernel's count, and damage of every kind.

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::mpsc;

use proptest::prelude::*;

use super::arena::SEGMENT;
use super::*;

/// Pages of guest RAM in these tests.
const RAM: u64 = 2048;

type Content = Box<[u8; PAGE]>;

/// Content of page `page` in its `version`: zeroes, a word, text, records, half random, or random.
fn content(kind: u8, page: u32, version: u32) -> Content {
    let mut state = (u64::from(page) << 32) | (u64::from(version) << 1) | 1;
    let mut next = move || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as u32
    };
    let mut bytes = vec![0u8; PAGE];
    match kind {
        0 => {}
        1 => bytes.as_chunks_mut::<8>().0.fill(((u64::from(next()) << 32) | (u64::from(page) + 1)).to_le_bytes()),
        2 => bytes.iter_mut().enumerate().for_each(|(at, byte)| {
            *byte = b"what a cold page says"[at % 21] ^ u8::from(next() % 60 == 0);
        }),
        3 => bytes.chunks_mut(32).for_each(|record| record[..4].copy_from_slice(&next().to_le_bytes())),
        4 => bytes[..PAGE / 2].fill_with(|| next() as u8),
        _ => bytes.fill_with(|| next() as u8),
    }
    bytes.into_boxed_slice().try_into().unwrap()
}

/// Pages of the arena that the kernel says are there.
fn resident(arena: &Arena) -> u64 {
    let (base, bytes) = arena.raw();
    let mut pages = vec![0u8; bytes / PAGE];
    // SAFETY: the range is a mapping of ours, and there is a byte for each of its pages.
    assert_eq!(unsafe { libc::mincore(base.cast(), bytes, pages.as_mut_ptr()) }, 0);
    pages.iter().map(|page| u64::from(page & 1)).sum()
}

/// Both halves, and what the owner of the frame table would know.
struct Model {
    writer: Writer,
    reader: Reader,
    places: BTreeMap<u32, (Place, Content)>,
    /// Moves that the fault thread has not read yet.
    late: Vec<Moved>,
    version: u32,
}

impl Model {
    fn new(ram: u64, codec: Codec) -> Self {
        let Store { writer, reader, .. } = Store::new(ram, codec, None).unwrap();
        Self { writer, reader, places: BTreeMap::new(), late: Vec::new(), version: 0 }
    }

    /// Evicts `pages` with content of `kind`; returns how many are stored.
    fn evict(&mut self, pages: impl Iterator<Item = u32>, kind: u8, room: u64) -> usize {
        self.version += 1;
        let mut batch = Vec::new();
        for page in pages.take(BATCH) {
            let content = content(kind, page, self.version);
            if !self.places.contains_key(&page) && self.writer.compress(page, &content) != Outcome::Incompressible {
                batch.push((page, content));
            }
        }
        assert_eq!(self.writer.pending(), batch.len());
        let kept = self.writer.keep_within(room);
        let (takes, before) = (self.writer.would_take(), self.writer.resident_pages());
        assert!(takes <= room && takes <= kept as u64, "{takes} pages for {kept}, room for {room}");
        let mut stored = Vec::new();
        self.writer.append(&mut stored);
        assert_eq!(self.writer.resident_pages(), before + takes, "what would be taken is taken");
        batch.truncate(kept);
        assert_eq!(stored.len(), kept);
        // The fault thread reads messages in order: the moves came first.
        self.read_moves();
        for ((page, content), stored) in batch.into_iter().zip(stored) {
            assert_eq!(page, stored.page);
            assert!(self.places.insert(page, (stored.place, content)).is_none());
        }
        kept
    }

    fn refault(&mut self, page: u32) {
        if let Some((place, content)) = self.places.remove(&page) {
            self.verify(page, place, &content);
            self.reader.release(page, place).unwrap();
        }
    }

    fn verify(&mut self, page: u32, place: Place, content: &Content) {
        let mut out = [0xee; PAGE];
        self.reader.read(page, place, &mut out).unwrap();
        assert!(out == **content, "page {page} came back changed");
    }

    fn clean(&mut self, room: u64) -> usize {
        let before = self.writer.resident_pages();
        let cleaned = self.writer.clean(room, &mut self.late).unwrap();
        assert!(self.writer.resident_pages() - before <= room);
        cleaned
    }

    fn read_moves(&mut self) {
        for Moved { page, old, new } in self.late.drain(..) {
            let unused = match self.places.get_mut(&page) {
                Some((place, _)) if *place == old => std::mem::replace(place, new),
                _ => new,
            };
            self.reader.release(page, unused).unwrap();
        }
    }

    fn verify_all(&mut self) {
        for (page, (place, content)) in std::mem::take(&mut self.places) {
            self.verify(page, place, &content);
            self.places.insert(page, (place, content));
        }
    }

    fn check(&self) {
        assert_eq!(self.writer.resident_pages(), resident(&self.writer.arena), "counted against mincore");
        let bytes = self.writer.live_bytes() + self.writer.dead_bytes();
        assert!(bytes <= self.writer.resident_pages() * PAGE as u64);
    }

    /// Cleans until there is nothing to clean.
    fn settle(&mut self) {
        self.read_moves();
        self.writer.collect(0).unwrap();
        while self.writer.needs_cleaning() && self.clean(u64::MAX) > 0 {
            self.read_moves();
            self.writer.collect(0).unwrap();
        }
        self.check();
        assert!(!self.writer.needs_cleaning(), "{:?}", self.writer);
    }

    /// All that is stored, released.
    fn empty(&mut self) {
        self.read_moves();
        let pages: Vec<u32> = self.places.keys().copied().collect();
        pages.into_iter().for_each(|page| self.refault(page));
        self.writer.collect(0).unwrap();
        self.check();
        assert_eq!((self.writer.resident_pages(), self.writer.live_bytes(), self.writer.dead_bytes()), (0, 0, 0));
    }
}

#[derive(Clone, Debug)]
enum Step {
    Evict { first: u32, count: u32, kind: u8, room: u64 },
    Refault { first: u32, count: u32, stride: u32 },
    Clean { room: u64 },
    ReadMoves,
    Collect { keep: usize },
}

fn step() -> impl Strategy<Value = Step> {
    let page = 0..RAM as u32;
    prop_oneof![
        5 => (page.clone(), 1..200u32, 0..6u8, prop_oneof![Just(u64::MAX), 0..40u64])
            .prop_map(|(first, count, kind, room)| Step::Evict { first, count, kind, room }),
        4 => (page, 1..400u32, 1..7u32).prop_map(|(first, count, stride)| Step::Refault { first, count, stride }),
        2 => prop_oneof![Just(1u64 << 40), 0..60u64].prop_map(|room| Step::Clean { room }),
        1 => Just(Step::ReadMoves),
        2 => (0..3usize).prop_map(|keep| Step::Collect { keep }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Whatever is evicted, refaulted, cleaned and collected in whatever order: every content comes back, real memory is
    /// what is counted, an eviction never needs more than it frees, and cleaning leaves little that is dead.
    #[test]
    fn a_store_is_a_map_of_pages(zstd: bool, steps in prop::collection::vec(step(), 1..60)) {
        let mut model = Model::new(RAM, if zstd { Codec::Zstd } else { Codec::Lz4 });
        for step in steps {
            match step {
                Step::Evict { first, count, kind, room } => {
                    let pages: Vec<u32> = (first..(first + count).min(RAM as u32)).collect();
                    for batch in pages.chunks(BATCH) {
                        model.evict(batch.iter().copied(), kind, room);
                    }
                }
                Step::Refault { first, count, stride } => {
                    (first..first + count).step_by(stride as usize).for_each(|page| model.refault(page));
                }
                Step::Clean { room } => _ = model.clean(room),
                Step::ReadMoves => model.read_moves(),
                Step::Collect { keep } => _ = model.writer.collect(keep).unwrap(),
            }
            model.check();
        }
        model.settle();
        model.verify_all();
        model.empty();
    }

    /// Damaged bytes are reported, or were nobody's: never a panic, and never another content.
    #[test]
    fn no_damage_goes_unnoticed(zstd: bool, seed: u32, damage in prop::collection::vec((0..1usize << 19, 0..8u32), 1..40)) {
        let mut model = Model::new(RAM, if zstd { Codec::Zstd } else { Codec::Lz4 });
        for (kind, first) in [(1, 0), (2, 64), (3, 128), (4, 192), (3, 256)] {
            model.version = seed.wrapping_add(kind);
            model.evict(first..first + 64, kind as u8, u64::MAX);
        }
        (0..320).step_by(3).for_each(|page| model.refault(page));
        let (base, _) = model.writer.arena.raw();
        let real = model.writer.resident_pages() as usize * PAGE;
        for (at, bit) in damage {
            // SAFETY: the pages that are real are the first of the mapping, and no other thread is here.
            unsafe { *base.add(at % real) ^= 1 << bit };
        }
        _ = model.writer.clean(1 << 40, &mut model.late);
        for (page, (place, content)) in std::mem::take(&mut model.places) {
            let mut out = [0; PAGE];
            if model.reader.read(page, place, &mut out).is_ok() {
                prop_assert!(out == *content, "page {}", page);
            }
            _ = model.reader.release(page, place);
        }
        _ = model.writer.collect(0);
    }

    /// A place that is none is refused, whatever number it is.
    #[test]
    fn no_number_is_taken_for_a_place(raw in prop_oneof![1..40_000u32, any::<u32>()], page in 0..64u32) {
        let mut model = Model::new(RAM, Codec::Lz4);
        model.evict(0..64, 3, u64::MAX);
        if let Some(place) = Place::from_raw(raw).filter(|place| *place != Place::ZEROES) {
            let true_place = model.places[&page].0 == place;
            let mut out = [0; PAGE];
            prop_assert_eq!(model.reader.read(page, place, &mut out).is_ok(), true_place);
            prop_assert_eq!(model.reader.release(page, place).is_ok(), true_place);
            prop_assert!(model.reader.release(page, place).is_err(), "twice");
        }
    }
}

#[test]
fn pages_are_told_apart_by_what_they_hold() {
    let mut writer = Store::new(RAM, Codec::Lz4, None).unwrap().writer;
    assert_eq!(writer.compress(0, &content(0, 0, 0)), Outcome::Zeroes);
    assert_eq!(writer.compress(1, &content(1, 1, 0)), Outcome::Word);
    assert!(matches!(writer.compress(2, &content(3, 2, 0)), Outcome::Compressed(100..2000)));
    assert_eq!(writer.compress(3, &content(5, 3, 0)), Outcome::Incompressible);
    assert_eq!(writer.pending(), 3);
    let mut stored = Vec::new();
    writer.append(&mut stored);
    assert_eq!(stored.iter().map(|s| s.page).collect::<Vec<_>>(), [0, 1, 2]);
    assert_eq!((stored[0].place, writer.resident_pages()), (Place::ZEROES, 1));
}

/// Zeroes are free, so a batch of them fits where there is no room for anything.
#[test]
fn a_batch_is_cut_to_the_room_that_is_left() {
    let mut model = Model::new(RAM, Codec::Lz4);
    assert_eq!(model.evict(0..64, 0, 0), 64);
    assert_eq!(model.evict(64..128, 4, 0), 0);
    let kept = model.evict(64..128, 4, 5);
    assert!((7..64).contains(&kept), "{kept} half random pages on five");
    assert_eq!(model.writer.resident_pages(), 5);
    model.verify_all();
}

/// What was kept is written again without a new page; what is not kept is gone at once.
#[test]
fn an_empty_segment_is_kept_or_discarded() {
    let mut model = Model::new(RAM, Codec::Lz4);
    for _ in 0..2 {
        for first in (0..192).step_by(64) {
            model.evict(first..first + 64, 4, u64::MAX);
        }
        assert!(model.writer.resident_pages() > 4 * SEGMENT as u64 / PAGE as u64);
        let emptied = model.reader.emptied();
        (0..192).for_each(|page| model.refault(page));
        assert!(model.reader.emptied() > emptied, "the fault thread can see that there is something to collect");
        model.writer.collect(2).unwrap();
        assert_eq!(model.writer.resident_pages(), 32);
        model.check();
        assert_eq!(model.evict(0..16, 4, 0), 16, "kept pages are written without room for more");
        (0..16).for_each(|page| model.refault(page));
    }
    model.empty();
}

/// Nobody says a second time that a segment is empty which was still open the first time.
#[test]
fn a_segment_that_falls_empty_while_it_is_open_is_collected() {
    let mut model = Model::new(RAM, Codec::Lz4);
    for first in (0..256).step_by(16) {
        model.evict(first..first + 16, 4, u64::MAX);
        (first..first + 16).for_each(|page| model.refault(page));
    }
    assert!(model.writer.resident_pages() > 2 * SEGMENT as u64 / PAGE as u64);
    model.empty();
}

/// What a batch takes is charged before it is appended, so nothing may change it.
#[test]
#[should_panic(expected = "append the batch first")]
fn nothing_is_discarded_behind_a_batch_that_was_measured() {
    let mut model = Model::new(RAM, Codec::Lz4);
    model.evict(0..64, 4, u64::MAX);
    (0..64).for_each(|page| model.refault(page));
    model.writer.compress(0, &content(4, 0, 0));
    _ = model.writer.collect(0);
}

/// The guest touches pages while their entries are being moved: the copy is the one that is dropped.
#[test]
fn a_page_that_is_touched_while_it_moves_is_not_moved() {
    let mut model = Model::new(RAM, Codec::Lz4);
    for first in (0..512).step_by(64) {
        model.evict(first..first + 64, 4, u64::MAX);
    }
    (0..512).filter(|page| page % 4 != 0).for_each(|page| model.refault(page));
    assert!(model.writer.needs_cleaning());
    assert!(model.clean(1 << 40) > 0 && !model.late.is_empty());
    let touched: Vec<u32> = model.late.iter().map(|moved| moved.page).step_by(2).collect();
    touched.iter().for_each(|page| model.refault(*page));
    model.writer.collect(0).unwrap();
    model.evict(touched.into_iter(), 3, u64::MAX);
    model.settle();
    model.verify_all();
    model.empty();
}

/// Reads a batch out to `file`, as the reclaim thread does, and notes the moves.
fn write_back(model: &mut Model, file: &mut Spill<File>) -> Result<(), Corrupt> {
    let (mut old, mut stored) = (Vec::new(), Vec::new());
    let read = model.writer.read_out(|page, place, content| {
        let taken = file.put(page, content);
        old.extend(taken.then_some(place));
        taken
    });
    file.write(&mut stored).unwrap();
    let moved = stored.iter().zip(old).map(|(stored, old)| Moved { page: stored.page, old, new: stored.place });
    model.late.extend(moved);
    read
}

fn with_file(pages: u32) -> (Model, Spill<File>) {
    let mut model = Model::new(RAM, Codec::Lz4);
    let file = Spill::new(tempfile::tempfile().unwrap(), pages).unwrap();
    model.reader = Reader::new(model.writer.arena.clone(), Codec::Lz4, Some(file.released())).unwrap();
    (model, file)
}

/// A store that is too large empties into the file, and what the guest touches meanwhile is not there twice.
#[test]
fn a_store_can_be_written_back_to_the_last_byte() {
    let (mut model, mut file) = with_file(RAM as u32);
    for (kind, first) in [(1, 0), (2, 64), (4, 128), (4, 192), (3, 256), (0, 320)] {
        model.evict(first..first + 64, kind, u64::MAX);
    }
    (0..384).step_by(5).for_each(|page| model.refault(page));
    let mut batches = 0;
    while model.writer.resident_pages() > 0 {
        write_back(&mut model, &mut file).unwrap();
        assert!(!model.late.is_empty(), "{:?}", model.writer);
        let touched = model.late[0].page;
        model.refault(touched);
        model.read_moves();
        model.writer.collect(0).unwrap();
        model.check();
        batches += 1;
    }
    assert!(batches > 4, "a batch at a time");
    for (page, (place, content)) in &model.places {
        let mut out = [0; PAGE];
        match place.slot() {
            Some(_) => file.read(*page, *place, &mut out).unwrap(),
            None => assert_eq!(*place, Place::ZEROES),
        }
        assert!(out == **content, "page {page}");
        model.reader.release(*page, *place).unwrap();
    }
}

/// The segments with the least that lives go first: that frees the most memory for what is written.
#[test]
fn what_is_written_back_first_is_what_keeps_the_most_memory_that_is_dead() {
    let (mut model, mut file) = with_file(RAM as u32);
    for first in (0..256).step_by(64) {
        model.evict(first..first + 64, 4, u64::MAX);
    }
    // Seven of eight pages in the middle: of some segments little is left.
    (64..192).filter(|page| page % 8 != 0).for_each(|page| model.refault(page));
    let before = model.writer.resident_pages();
    write_back(&mut model, &mut file).unwrap();
    let few = model.late.iter().filter(|moved| (64..192).contains(&moved.page)).count();
    model.read_moves();
    model.writer.collect(0).unwrap();
    assert!(few >= 8 && before - model.writer.resident_pages() >= 48, "{few}, {before}, {:?}", model.writer);
}

/// A full file takes what it can; nothing is lost, and the rest stays where it is.
#[test]
fn a_full_file_takes_no_more_of_a_store() {
    let (mut model, mut file) = with_file(10);
    (0..128).step_by(64).for_each(|first| _ = model.evict(first..first + 64, 4, u64::MAX));
    for taken in [10, 0] {
        write_back(&mut model, &mut file).unwrap();
        assert_eq!(model.late.len(), taken);
        model.read_moves();
    }
    model.places.retain(|_, (place, _)| place.slot().is_none());
    assert_eq!(model.places.len(), 118);
    model.verify_all();
}

/// A damaged entry is reported once, and the file gets nothing of it; everything else moves.
#[test]
fn a_damaged_entry_is_not_written_back() {
    let (mut model, mut file) = with_file(RAM as u32);
    (0..256).step_by(64).for_each(|first| _ = model.evict(first..first + 64, 4, u64::MAX));
    let (base, _) = model.writer.arena.raw();
    // SAFETY: the first segment is written, and no other thread is here.
    unsafe { *base.add(SEGMENT / 2) ^= 1 };
    let mut reported = 0;
    loop {
        reported += u32::from(write_back(&mut model, &mut file).is_err());
        if model.late.is_empty() {
            break;
        }
        model.read_moves();
    }
    assert_eq!(reported, 1);
    model.writer.collect(0).unwrap();
    assert_eq!(model.writer.resident_pages(), SEGMENT as u64 / PAGE as u64, "the segment is left alone");
    let damaged = std::mem::take(&mut model.places).into_iter().filter(|(page, (place, content))| {
        let mut out = [0; PAGE];
        match place.slot() {
            Some(_) => file.read(*page, *place, &mut out).unwrap(),
            None if model.reader.read(*page, *place, &mut out).is_err() => return true,
            None => {}
        }
        assert!(out == **content, "page {page}");
        false
    });
    assert_eq!(damaged.count(), 1);
}

/// An arena that is full takes no more, says so before anything is discarded, and has room again after cleaning.
#[test]
fn a_full_arena_refuses_and_recovers() {
    let mut model = Model::new(1, Codec::Lz4);
    let mut page = 0..;
    while model.evict(page.by_ref().take(BATCH), 4, u64::MAX) == BATCH {}
    assert_eq!(model.evict(page.by_ref().take(BATCH), 4, u64::MAX), 0);
    model.check();
    model.verify_all();
    let pages: Vec<u32> = model.places.keys().copied().filter(|page| page % 32 < 31).collect();
    pages.into_iter().for_each(|page| model.refault(page));
    model.writer.collect(0).unwrap();
    assert_eq!(model.evict(page.by_ref().take(1), 4, u64::MAX), 1);
    model.verify_all();
    model.empty();
}

/// Two threads, as in a worker: one evicts, cleans and collects, the other verifies, releases and answers.
#[test]
fn two_threads_share_a_store_without_a_lock() {
    enum Message {
        Stored(Vec<Stored>, u32),
        Moved(Vec<Moved>),
    }
    let Store { mut writer, mut reader, .. } = Store::new(RAM, Codec::Lz4, None).unwrap();
    let (tell, hear) = mpsc::sync_channel(2);
    let (give, back) = mpsc::channel::<u32>();
    let owner = std::thread::spawn(move || {
        let mut places = BTreeMap::new();
        let release = |reader: &mut Reader, page, (place, version): (Place, u32)| {
            let mut out = [0; PAGE];
            reader.read(page, place, &mut out).unwrap();
            assert!(out == *content((page % 5) as u8, page, version), "page {page}");
            reader.release(page, place).unwrap();
        };
        for message in hear {
            match message {
                Message::Stored(stored, version) => {
                    places.extend(stored.iter().map(|s| (s.page, (s.place, version))));
                    // Touched again at once: two of three of the oldest half.
                    let touched: Vec<u32> =
                        places.keys().copied().filter(|page| (page * 7 + version) % 3 > 0).collect();
                    for page in touched.into_iter().take(60) {
                        release(&mut reader, page, places.remove(&page).unwrap());
                        _ = give.send(page);
                    }
                }
                Message::Moved(moved) => {
                    for Moved { page, old, new } in moved {
                        let unused = match places.get_mut(&page) {
                            Some((place, _)) if *place == old => std::mem::replace(place, new),
                            _ => new,
                        };
                        reader.release(page, unused).unwrap();
                    }
                }
            }
        }
        places.into_iter().for_each(|(page, at)| release(&mut reader, page, at));
    });
    let mut cleaned = 0;
    let mut evictable: Vec<u32> = (0..RAM as u32).collect();
    for version in 0..200 {
        evictable.extend(back.try_iter());
        let from = evictable.len().saturating_sub(BATCH);
        for page in evictable.drain(from..) {
            assert_ne!(writer.compress(page, &content((page % 5) as u8, page, version)), Outcome::Incompressible);
        }
        assert_eq!(writer.keep_within(u64::MAX), writer.pending());
        let (mut stored, mut moved) = (Vec::new(), Vec::new());
        writer.append(&mut stored);
        tell.send(Message::Stored(stored, version)).unwrap();
        if writer.needs_cleaning() {
            cleaned += writer.clean(100, &mut moved).unwrap();
            tell.send(Message::Moved(moved)).unwrap();
        }
        writer.collect(1).unwrap();
    }
    drop(tell);
    owner.join().unwrap();
    assert!(cleaned > 8, "{cleaned} segments cleaned under the reader's eyes");
    writer.collect(0).unwrap();
    assert_eq!((writer.resident_pages(), resident(&writer.arena)), (0, 0));
}

#[test]
fn a_place_is_never_none_and_comes_back_from_its_number() {
    assert_eq!((Place::from_raw(0), Place::ZEROES.slot()), (None, None));
    assert_eq!(Place::of_slot(5).slot(), Some(5));
    for unit in [0, 1, FIRST_SLOT - 2] {
        let place = Place::of_unit(unit);
        assert_eq!((Place::from_raw(place.raw()), place.unit()), (Some(place), unit));
        assert_eq!(place.slot(), None);
    }
}
