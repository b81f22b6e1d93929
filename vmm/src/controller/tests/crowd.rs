//! Many guests that want more than there is, each with the account and the questions of a real worker, behind a link
//! that takes its time. What is under test is how much is said until everybody has what he can get.

use memcg_core::stock::Stock;

use super::limits::change;
use super::*;
use crate::memory::asked::Asked;

/// A worker whose guest wants to touch so many pages more.
struct Honest {
    fake: FakeWorker,
    stock: Stock,
    asked: Asked,
    wants: u64,
    held: bool,
    /// What was said last without being asked.
    told: (bool, u64),
    /// Messages in both directions.
    said: usize,
}

impl Honest {
    async fn start(controller: &Controller, name: &str, setup: Setup, wants: u64) -> Self {
        let setup = Setup { queue: 4096, ..setup };
        let fake = FakeWorker::add_to(controller, name, setup).await.expect("added");
        fake.say(FromWorker::Hello(hello(true))).await;
        fake.say(FromWorker::Loaded { plan: 0 }).await;
        let stock = Stock::new(Pages(RESERVE));
        Self { fake, stock, asked: Asked::default(), wants, held: false, told: (false, 0), said: 0 }
    }

    /// The guest touches at most `pages`, each of them a round of the worker's loop.
    async fn touch(&mut self, pages: u64) -> bool {
        let mut touched = false;
        for _ in 0..pages {
            if self.held || self.fake.report.paused || self.wants == 0 || self.stock.granted_total() == 0 {
                break;
            }
            let page =
                if self.stock.stock() > Pages(0) { self.stock.prepare(Pages(1)) } else { self.stock.prepare_reserve() };
            page.expect("held before the reserve is empty").commit(Pages(1));
            self.wants -= 1;
            touched = true;
            self.hold_if_short();
            self.speak().await;
        }
        touched
    }

    fn hold_if_short(&mut self) {
        let debt = self.stock.debt();
        let refused = self.asked.refused() || self.stock.room() == Some(Pages(0));
        self.held |= debt > Pages(0) && (refused || debt > self.stock.reserve());
    }

    /// Takes one message, if there is one.
    async fn hear(&mut self) -> bool {
        let Some(message) = self.fake.try_next().await else { return false };
        self.said += 1;
        match message {
            ToWorker::Grant { epoch, granted_total, stock_max, room, refused, .. } => {
                let room = (room != u64::MAX).then_some(Pages(room));
                let new = self.stock.grant(epoch, granted_total, Pages(stock_max), room).expect("consistent");
                self.asked.answered(new, refused);
                self.held &= self.stock.debt() > Pages(0);
                self.stock.give_back(self.stock.surplus(Pages::ZERO));
                if refused {
                    self.hold_if_short();
                }
            }
            ToWorker::Recall { seq } => {
                self.stock.recall();
                self.report(Some(seq), (0, 0)).await;
            }
            ToWorker::Query { seq } => self.report(Some(seq), (0, 0)).await,
            ToWorker::Pause { seq } => {
                self.fake.report.paused = true;
                self.report(Some(seq), (0, 0)).await;
            }
            ToWorker::Resume { seq } => {
                self.fake.report.paused = false;
                self.report(Some(seq), (0, 0)).await;
            }
            _ => {}
        }
        self.speak().await;
        true
    }

    /// Says what it must, as the worker's loop does after each event.
    async fn speak(&mut self) {
        let ask = self.asked.ask(&self.stock, Pages(0));
        if ask.is_some() || self.told != (self.held, self.stock.returned_total()) {
            self.report(None, ask.unwrap_or_default()).await;
        }
    }

    async fn report(&mut self, answers: Option<u32>, (want, want_now): (u64, u64)) {
        self.told = (self.held, self.stock.returned_total());
        self.said += 1;
        let stock = &self.stock;
        self.fake.report = Report {
            answers,
            epoch: stock.epoch(),
            granted_total: stock.granted_total(),
            returned_total: stock.returned_total(),
            guest: stock.guest().0,
            stock: stock.stock().0,
            reserve: stock.reserve().0,
            debt: stock.debt().0,
            want,
            want_now,
            held: self.held,
            paused: self.fake.report.paused,
            ..Report::default()
        };
        self.fake.tell().await;
    }
}

/// Lets all guests go on until nothing happens any more, and gives the number of messages. In each round a guest touches up
/// to eight pages, and a worker takes one message: faults are faster than answers.
async fn settle(crowd: &mut [Honest], most: usize) -> usize {
    crowd.iter_mut().for_each(|worker| worker.said = 0);
    loop {
        let mut moved = false;
        for worker in &mut *crowd {
            moved |= worker.touch(8).await;
            moved |= worker.hear().await;
        }
        let said = crowd.iter().map(|worker| worker.said).sum();
        assert!(said <= most, "{said} messages of {} workers, and no end", crowd.len());
        if !moved {
            return said;
        }
    }
}

/// So many VMs in a group with room for a third of what they want, and how much is said until they have it. The policy waits
/// for a minute.
async fn crowd(members: u64) -> (Controller, Vec<Honest>, usize) {
    let (controller, _) = Controller::start(Limit::Max);
    controller.put_group("/full", change(pages(members * 1000))).await.expect("made");
    let mut crowd = Vec::new();
    for n in 0..members {
        let oom = OomPolicy { deadline: Duration::from_secs(60), ..OomPolicy::default() };
        let setup = Setup { max: Limit::Max, group: "/full", oom, ..Setup::default() };
        crowd.push(Honest::start(&controller, &format!("vm{n}"), setup, 3000).await);
    }
    let said = settle(&mut crowd, 1_000_000).await;
    (controller, crowd, said)
}

/// Semantics: 60, T11.
#[tokio::test(start_paused = true)]
async fn a_group_that_is_full_comes_to_rest_after_few_messages() {
    for members in [10, 20] {
        let (controller, mut crowd, said) = crowd(members).await;
        let most = 200 * crowd.len();
        assert!(said <= most, "{said} messages of {members} workers for 1000 pages each");
        let group = controller.group("/full").await.expect("shown");
        assert_eq!(Some(group.memory.current_bytes), group.memory.max_bytes, "all of it is used");
        assert!(crowd.iter().all(|worker| worker.held && worker.stock.stock() == Pages(0)));
        assert_eq!(settle(&mut crowd, 0).await, 0, "at rest");
    }
}

/// A VM that stands still gets no stock, so its worker must not ask for one again and again.
/// Semantics: 60.
#[tokio::test(start_paused = true)]
async fn the_worker_of_a_paused_vm_has_nothing_to_say() {
    let (controller, _) = Controller::start(Limit::Max);
    let mut vms = [Honest::start(&controller, "vm", Setup::default(), 100).await];
    settle(&mut vms, 100).await;
    assert!(vms[0].stock.stock() > Pages(0));
    for verb in ["pause", "resume"] {
        let asked = controller.clone();
        let asking =
            tokio::spawn(
                async move { if verb == "pause" { asked.pause("vm").await } else { asked.resume("vm").await } },
            );
        tokio::task::yield_now().await;
        let said = settle(&mut vms, 20).await;
        asking.await.expect("no panic").expect("done");
        assert!(said <= 8, "{verb}: {said} messages");
        assert_eq!(vms[0].stock.stock() == Pages(0), verb == "pause", "{verb}");
    }
}

async fn count(controller: &Controller, kind: EventKind) -> usize {
    controller.events(0).await.expect("events").iter().filter(|event| event.event == kind).count()
}

/// Whoever has waited for longest is served first, whatever his number; nobody gets anything ahead of need before.
#[tokio::test(start_paused = true)]
async fn what_comes_back_goes_to_who_has_waited_for_longest() {
    let (controller, _) = Controller::start(Limit::Max);
    controller.put_group("/full", change(pages(3000))).await.expect("made");
    let mut crowd = Vec::new();
    for (name, wants) in [("a", 1000), ("b", 0), ("c", 0), ("d", 3000)] {
        let setup = Setup { max: Limit::Max, group: "/full", ..Setup::default() };
        crowd.push(Honest::start(&controller, name, setup, wants).await);
        settle(&mut crowd, 10_000).await;
    }
    for wants_now in [2, 1] {
        tokio::time::advance(Duration::from_millis(10)).await;
        crowd[wants_now].wants = 20;
        settle(&mut crowd, 10_000).await;
    }
    let debts: Vec<_> = crowd.iter().map(|worker| worker.stock.debt().0).collect();
    assert!(debts[0] == 0 && debts[1..].iter().all(|debt| *debt > 0), "{debts:?}");
    // As much as the first two of them wait for. Who gives it would like to have some of it ahead of need.
    let given = Pages(debts[3] + debts[2]);
    crowd[0].stock.uncharge(given);
    crowd[0].stock.recall();
    crowd[0].report(None, (10, 0)).await;
    for worker in &mut crowd {
        while worker.hear().await {}
    }
    let now: Vec<_> = crowd.iter().map(|worker| (worker.stock.debt().0, worker.stock.stock().0)).collect();
    assert_eq!(now, [(0, 0), (debts[1], 0), (0, 0), (0, 0)]);
}

/// Where nothing could be taken from anybody nobody is paused: all are held, and that is said once in a minute.
/// Semantics: 49, 51, B41.
#[tokio::test(start_paused = true)]
async fn a_full_group_that_nothing_can_be_taken_from_is_held() {
    let (controller, mut crowd, _) = crowd(5).await;
    for _ in 0..110 {
        tokio::time::sleep(Duration::from_secs(1)).await;
        settle(&mut crowd, 1000).await;
    }
    assert!(crowd.iter().all(|worker| worker.held && !worker.fake.report.paused));
    assert_eq!(
        (count(&controller, EventKind::Paused).await, count(&controller, EventKind::NobodyChosen).await),
        (0, 1)
    );
}

/// A pause by the policy is the end of the matter until there is real room: a page more is no reason to let somebody go on who
/// will want the next one.
/// Semantics: 51, T7.
#[tokio::test(start_paused = true)]
async fn nobody_flaps_between_pause_and_resume() {
    let (controller, _) = Controller::start(Limit::Max);
    let mut vm = [Honest::start(&controller, "vm", Setup { max: pages(1000), ..Setup::default() }, 3000).await];
    for _ in 0..70 {
        settle(&mut vm, 10_000).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    assert!(vm[0].fake.report.paused);
    assert_eq!((count(&controller, EventKind::Paused).await, count(&controller, EventKind::Resumed).await), (1, 0));
    // Its limit is raised a little, and again: that is collected until it is worth while.
    let (mut max, debt) = (1000, vm[0].stock.debt().0);
    while count(&controller, EventKind::Resumed).await == 0 {
        max += 7;
        controller.change("vm", change(pages(max))).await.expect("raised");
        settle(&mut vm, 1000).await;
        assert!(max < 1000 + debt + 100, "there is room by now");
    }
    assert!(max >= 1000 + debt + 64, "{max} for a debt of {debt}");
    for _ in 0..70 {
        settle(&mut vm, 1000).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    assert_eq!((count(&controller, EventKind::Paused).await, count(&controller, EventKind::Resumed).await), (2, 1));

    // Who asks for it by name gets what there is.
    max += vm[0].stock.debt().0;
    controller.change("vm", change(pages(max))).await.expect("raised");
    let asked = controller.clone();
    let asking = tokio::spawn(async move { asked.resume("vm").await });
    tokio::task::yield_now().await;
    settle(&mut vm, 1000).await;
    asking.await.expect("no panic").expect("its debt can be paid");
}

/// A worker that is slow to read its grant is held and not out of memory.
/// Semantics: 51.
#[tokio::test(start_paused = true)]
async fn a_grant_on_its_way_is_no_reason_to_pause() {
    let (controller, _) = Controller::start(Limit::Max);
    let mut vms = [Honest::start(&controller, "vm", Setup::default(), 100).await];
    settle(&mut vms, 100).await;
    // Faults that are faster than the link, which then stands still.
    let [vm] = &mut vms;
    vm.wants = 1000;
    vm.touch(1000).await;
    assert!(vm.held && vm.stock.debt() > Pages(0));
    tokio::time::sleep(Duration::from_secs(30)).await;
    assert_eq!(count(&controller, EventKind::VictimSelected).await, 0);
    settle(&mut vms, 1000).await;
    assert!(!vms[0].held && vms[0].wants == 0);
}
