//! A worker that says less than the host finds.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use memcg_core::units::{Limit, Pages};
use tokio::sync::mpsc;

use super::super::events::EventKind;
use super::super::residency::Residency;
use super::super::{Controller, VmSpec, WorkerProcess};
use super::{RESERVE, Setup};
use crate::controller::error::Code;
use crate::controller::link::FromLink;
use crate::memory::Ram;
use crate::worker::protocol::{FromWorker, Hello, Report, ToWorker};

/// This very process, as somebody's worker.
struct Myself(Residency, Arc<AtomicBool>);

impl WorkerProcess for Myself {
    fn pid(&self) -> i32 {
        std::process::id().cast_signed()
    }

    fn kill(&self) {
        self.1.store(true, Ordering::Relaxed);
    }

    fn residency(&self) -> Option<&Residency> {
        Some(&self.0)
    }
}

fn touch(ram: &Ram, pages: std::ops::Range<u64>) {
    for page in pages {
        // SAFETY: the page is in the mapping, which nobody else knows.
        unsafe { (ram.hva(page) as *mut u64).write_volatile(1) };
    }
}

/// Pages that this process may have beside the RAM, as the worker's overhead: other tests run in it at the same time, and
/// what they have is no lie of this one.
const BESIDE: u64 = 1 << 20;

/// The test's own process plays a worker with real RAM: what it fills beyond its grants is found, and ends it the second
/// time.
#[tokio::test]
async fn a_worker_with_more_memory_than_it_was_granted_is_ended_at_the_second_look() {
    const PAGES: u64 = 8192;
    let ram = Ram::map(&[(0, PAGES * 4096)]).expect("mapped");
    ram.keep_to_touches().expect("small pages");
    let (controller, _task) = Controller::start(Limit::Max);
    let Setup { oom, .. } = Setup::default();
    let limits = memcg_core::tree::LimitPatch { max: Some(Limit::Pages(Pages(BESIDE + 4096))), ..Default::default() };
    let overhead = super::cost([(memcg_core::tree::Overhead::Worker, BESIDE)]);
    let spec = VmSpec { limits, oom, overhead, size: Pages(PAGES), ..super::plain("liar") };
    let id = controller.create(spec).await.expect("created");
    let killed = Arc::new(AtomicBool::new(false));
    let me = Residency::open(std::process::id().cast_signed(), None).expect("looked into");
    let (to_worker, mut inbox) = mpsc::channel(64);
    let _end = controller.attach(id, Box::new(Myself(me, Arc::clone(&killed))), to_worker).await.expect("attached");
    let hello = FromWorker::Hello(Hello { ram: ram.slot_array(), ..super::hello(true) });
    controller.heard(id, FromLink::Message(hello)).await;
    let Some(ToWorker::Grant { granted_total, .. }) = inbox.recv().await else { panic!("no grant") };
    let charged = granted_total;
    assert!(charged > 200 && charged < 4096, "{charged}");

    touch(&ram, 0..charged);
    let honest = controller.audit(id).await.expect("audited");
    assert_eq!((honest.resident.0, honest.charged.0), (charged, charged));
    assert!(honest.ok(), "{honest:?}");
    let nobody = controller.audit_all().await.expect("audited");
    assert!(nobody.ok && nobody.message.starts_with("0 VMs"), "it has not said what it holds: {nobody:?}");

    // The report says what was granted, and the host finds twice as much.
    let report = Report { granted_total, guest: charged - RESERVE, reserve: RESERVE, ..Report::default() };
    controller.heard(id, FromLink::Message(FromWorker::Report(report))).await;
    touch(&ram, 0..2 * charged);
    assert!(!controller.audit(id).await.expect("audited").ok());
    assert!(!killed.load(Ordering::Relaxed), "once may be an accident");
    let finding = controller.audit_all().await.expect("audited");
    assert!(killed.load(Ordering::Relaxed));
    assert!(!finding.ok && finding.message.starts_with("liar: holds "), "{finding:?}");
    assert!(finding.message.ends_with("it was ended"), "{finding:?}");
    controller.worker_died(id, super::Death::Signal(libc::SIGKILL)).await;
    controller.heard(id, FromLink::Closed).await;
    let events = controller.events(0).await.expect("events");
    let died = events.iter().find(|event| event.event == EventKind::WorkerDied).expect("said");
    let reason = died.details["reason"].as_str().expect("a reason");
    let numbers = memcg_core::units::human(2 * charged * 4096);
    assert!(reason.contains(&format!("holds {numbers} of guest memory")), "{reason}");
    assert_eq!(controller.audit(id).await.expect_err("it has ended").code, Code::NotFound);
    assert!(controller.audit_all().await.expect("audited").ok, "nobody is left");
}
