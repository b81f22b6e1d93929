//! Page cache: a file of the kernel's disk in memory. What is cached of it is clean, so the kernel may drop it whenever it
//! needs memory, and read it again.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;

use guest_common::{Arguments, Fill, PAGE_SIZE, PAGE_WORDS};

/// The disk. Its memory is the kernel's own, beside the cache.
const DISK: &str = "/dev/ram0";

/// What was written to the disk, and is in the cache for some part.
pub struct Cache {
    disk: File,
    pages: u64,
    seed: u64,
    fill: Fill,
}

impl Cache {
    /// `cache SIZE [seed=N] [fill=half]`: writes a pattern to the disk, so that all of it is in the cache.
    pub fn new(arguments: Arguments<'_>) -> Result<Self, String> {
        let size = arguments.number(0, "SIZE").map_err(|e| e.to_string())?;
        let seed = arguments.number_or("seed", 1).map_err(|e| e.to_string())?;
        let fill = arguments.fill().map_err(|e| e.to_string())?;
        let disk = OpenOptions::new().read(true).write(true).open(DISK).map_err(|e| format!("{DISK}: {e}"))?;
        let cache = Self { disk, pages: size.div_ceil(PAGE_SIZE), seed, fill };
        cache.write().map_err(|e| format!("cannot write to {DISK}: {e}"))?;
        Ok(cache)
    }

    fn write(&self) -> io::Result<()> {
        for page in 0..self.pages {
            self.disk.write_all_at(&self.contents(page), page * PAGE_SIZE)?;
        }
        // What is written back is clean.
        self.disk.sync_all()
    }

    /// Reads everything back; what is no longer cached is cached again.
    pub fn verify(&self) -> Result<String, String> {
        let (mut bad, mut first) = (0, None);
        let mut found = [0; PAGE_SIZE as usize];
        for page in 0..self.pages {
            let read = self.disk.read_exact_at(&mut found, page * PAGE_SIZE);
            read.map_err(|e| format!("cannot read {DISK}: {e}"))?;
            if found != self.contents(page) {
                bad += 1;
                first.get_or_insert(page);
            }
        }
        Ok(match first {
            None => format!("CACHE ok pages={}", self.pages),
            Some(first) => format!("CACHE bad pages={} bad={bad} first={first}", self.pages),
        })
    }

    fn contents(&self, page: u64) -> [u8; PAGE_SIZE as usize] {
        let mut words = [0; PAGE_WORDS];
        self.fill.words().for_each(|word| words[word] = self.fill.value(self.seed, page, word));
        let mut bytes = [0; PAGE_SIZE as usize];
        bytes.chunks_exact_mut(8).zip(words).for_each(|(bytes, word): (&mut [u8], u64)| {
            bytes.copy_from_slice(&word.to_ne_bytes());
        });
        bytes
    }
}
