//! A guest without an operating system: it obeys the commands on its command line, or on the serial port.
//!
//! It runs at privilege level 3 (where hosts that emulate privileged code are still fast), in 64-bit mode, over an
//! identity map, with no interrupt descriptor table: nothing may fault, and there is no HLT. It waits by asking the
//! monitor, through a port that is answered late.
//!
//! Commands stand one after the other, separated by `;`. Each answers with one line that begins with `OK` or `ERR`. The
//! first error ends the guest with status 1, the end of the command line with 0; `shell` reads on from the serial port,
//! where an error ends nothing, and ends with 0 when the power button is pressed. Numbers are decimal or `0x`, with K, M, G, T.
//!
//! ```text
//! touch START SIZE [stride=4K] [seed=1] [passes=1] [mode=write|read] [full=1] [cpus=all] [mark=N]
//!                    mark: one before each page
//! verify START SIZE [stride=4K] [seed=1] [full=1] [zero=ok|only]     every page holds its pattern (or zeroes)
//!                    fill=ends|half|mixed|same|full: what of a page is written, and how much of that differs
//! random START SIZE count=N [seed=1]                                 like touch, N pages drawn at random
//! hot START SIZE [passes=1] [stride=4K]                              increments a counter in each page; none is lost
//! storm [START SIZE] [passes=N]                                      all vCPUs touch their shares as fast as they can
//! access PATTERN START SIZE [hot=SIZE] [spread=1] [periods=N] [period=1000 | each=N] [write=50] [moves=4] [seed=1]
//!     [check=1]      accesses pages until somebody types; PATTERN is hot, zipf, scan, phase or idle. After each period,
//!                    of so many ms or accesses, a mark and `ACCESS n= touches= cycles_per_1000= distinct= two= bad=`:
//!                    pages used in it, and in it and the one before. `check`s for the pattern of `touch`
//! rewrite START SIZE [seconds=N] [seed=1]                            all vCPUs: new contents, if the last ones are there
//! rewrite START SIZE background=1 [seed=1] | stop                    the same by all but vCPU 0, which obeys meanwhile
//! latency START SIZE [stride=4K]                                     writes to each page: p50_ns= p99_ns= max_ns=
//! balloon init [features=MASK] [device=N] [size=16]                  finds the device and switches it on
//! balloon inflate START SIZE [touch=1] | deflate START SIZE | report START SIZE
//! balloon auto START SIZE [rounds=1] [limit=N] [every=10]            follows the device's target with those pages
//! balloon give START SIZE [stride=4K] [numbers=4M]                   inflates, between two marks, with one ring of the bell
//! balloon allocate START SIZE [order=9] [steps=1000] [every=2000] [passes=1] [report=1] [seed=1]
//!                    allocates and frees blocks, touches the new ones; each `every` ms reports those that are free
//! balloon evil numbers QUEUE FIRST COUNT [step=1]                    page numbers of any kind
//! balloon evil index QUEUE AHEAD | head QUEUE HEAD | chain QUEUE NEXT | flags QUEUE FLAGS | rings QUEUE GPA
//! balloon evil buffer QUEUE GPA LENGTH [write=1] | stats QUEUE GPA TAGS | features MASK | kicks QUEUE COUNT
//! balloon evil flood START SIZE [rounds=N] [touch=1] | reset START SIZE [rounds=N]
//! balloon status | raw QUEUE GPA LENGTH [write=1] | reset
//! peek GPA | poke GPA VALUE | echo TEXT | wait MS | park | mark N | exit N | shell
//! ```
#![no_std]
#![no_main]

mod access;
mod balloon;
mod io;
mod latency;
mod memory;
mod rewrite;
mod support;
mod team;

use core::fmt::Write;
use core::ops::ControlFlow;

use guest_common::{Arguments, BadArgument};

use balloon::Balloon;
use io::Line;

// The header that the monitor knows a flat payload by, and the entry. vCPU 0 formats text: it gets a stack of its own,
// because the one it is given may be a single page.
core::arch::global_asm!(
    ".pushsection .header, \"a\"",
    ".ascii \"BALLAST1\"",
    ".long __entry_offset",
    ".long __image_bytes",
    ".popsection",
    ".pushsection .bss.stack, \"aw\", @nobits",
    ".balign 4096",
    ".skip 65536",
    "stack_top:",
    ".popsection",
    ".pushsection .text.start, \"ax\"",
    ".globl _start",
    "_start:",
    "cld",
    "test edx, edx",
    "jnz 1f",
    "lea rsp, [rip + stack_top]",
    "1:",
    "and rsp, -16",
    "xor ebp, ebp",
    "call {main}",
    "ud2",
    ".popsection",
    main = sym payload_main,
);

/// What is wrong with a command, in words for its `ERR` line.
pub enum Error {
    /// An argument is missing or not understood.
    Argument(BadArgument),
    /// Anything else; details, if any, are in the answer already.
    Other(&'static str),
}

impl From<BadArgument> for Error {
    fn from(bad: BadArgument) -> Self {
        Error::Argument(bad)
    }
}

/// What vCPU 0 keeps between commands.
struct Session {
    ram: u64,
    cpus: u64,
    balloon: Balloon,
    answer: Line,
}

/// Where all vCPUs arrive, with what the monitor put into their registers.
extern "C" fn payload_main(cmdline: *const u8, ram: u64, cpu: u64, cpus: u64) -> ! {
    if cpu != 0 {
        team::serve(cpu);
    }
    io::mask_interrupts();
    let mut session = Session { ram, cpus, balloon: Balloon::new(), answer: Line::new() };
    // SAFETY: the monitor promises a NUL-terminated command line there, which nothing changes while the guest runs.
    let commands = unsafe { core::ffi::CStr::from_ptr(cmdline.cast()) };
    let Ok(commands) = commands.to_str() else {
        io::print("ERR the command line is not UTF-8\n");
        io::exit(1);
    };
    match session.run(commands) {
        ControlFlow::Continue(()) => io::exit(0),
        ControlFlow::Break(()) => io::exit(1),
    }
}

impl Session {
    /// Runs commands separated by `;` up to the first that fails.
    fn run(&mut self, commands: &str) -> ControlFlow<()> {
        for command in commands.split(';').map(str::trim).filter(|c| !c.is_empty()) {
            if command == "shell" {
                self.shell();
            }
            self.answer.clear();
            // What does not fit is cut off, here and below: a line is as long as it is.
            let result = self.obey(command);
            match result {
                Ok(()) => io::answer("OK ", command, self.answer.text()),
                Err(Error::Other(what)) => {
                    let _ = write!(self.answer, " {what}");
                    io::answer("ERR ", command, self.answer.text());
                }
                Err(Error::Argument(bad)) => {
                    let _ = write!(self.answer, " {bad}");
                    io::answer("ERR ", command, self.answer.text());
                }
            }
            if result.is_err() {
                return ControlFlow::Break(());
            }
        }
        ControlFlow::Continue(())
    }

    /// Obeys lines from the serial port for ever.
    fn shell(&mut self) -> ! {
        io::print("READY\n");
        loop {
            let mut line = Line::new();
            io::read_line(&mut line);
            // An error has been printed; the next line is another chance.
            let _ = self.run(line.text());
        }
    }

    /// Obeys one command; its results go to the answer, as ` key=value`.
    fn obey(&mut self, command: &str) -> Result<(), Error> {
        let (verb, rest) = command.split_once(' ').unwrap_or((command, ""));
        let arguments = Arguments(rest);
        match verb {
            "touch" => memory::touch(arguments, self.cpus, &mut self.answer),
            "verify" => memory::verify(arguments, &mut self.answer),
            "random" => memory::random(arguments, &mut self.answer),
            "hot" => memory::hot(arguments, &mut self.answer),
            "storm" => memory::storm(arguments, self.ram, self.cpus, &mut self.answer),
            "access" => access::access(arguments, &mut self.answer),
            "latency" => latency::latency(arguments, &mut self.answer),
            "rewrite" => rewrite::rewrite(arguments, self.cpus, &mut self.answer),
            "balloon" => self.balloon.obey(arguments, &mut self.answer),
            "peek" => {
                let value = memory::peek(arguments.number(0, "GPA")?);
                let _ = write!(self.answer, " value={value:#x}");
                Ok(())
            }
            "poke" => {
                memory::poke(arguments.number(0, "GPA")?, arguments.number(1, "VALUE")?);
                Ok(())
            }
            "echo" => {
                let _ = write!(self.answer, " {rest}");
                Ok(())
            }
            "wait" => {
                io::wait(io::dword(arguments.number(0, "MS")?));
                Ok(())
            }
            "park" => loop {
                io::wait(u32::MAX);
            },
            "mark" => {
                io::mark(io::dword(arguments.number(0, "N")?));
                Ok(())
            }
            "exit" => {
                let status = io::dword(arguments.number(0, "N")?);
                io::answer("OK ", command, "");
                io::exit(status)
            }
            _ => Err(Error::Other("no such command")),
        }
    }
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    let mut line = Line::new();
    // A message that does not fit is cut off.
    let _ = writeln!(line, "ERR panic: {info}");
    io::print(line.text());
    io::exit(101)
}
