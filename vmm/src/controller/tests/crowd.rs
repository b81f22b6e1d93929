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
            ToWorker::Grant { epoch, granted_total, stock_max, room, refused } => {
                let room = (room != u64::MAX).then_some(Pages(room));
                let new = self.stock.grant(epoch, granted_total, Pages(stock_max), room).expect("consistent");
                self.asked.answered(new, refused);
                self.held &= self.stock.debt() > Pages(0);
                self.stock.give_back(self.stock.surplus());
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

/// So many VMs in a group with room for a third of what they want, and how much is said until they have it.
async fn crowd(members: u64) -> (Controller, Vec<Honest>, usize) {
    let (controller, _) = Controller::start(Limit::Max);
    controller.put_group("/full", change(pages(members * 1000))).await.expect("made");
    let mut crowd = Vec::new();
    for n in 0..members {
        let oom = OomPolicy { deadline: Duration::from_secs(3600), ..OomPolicy::default() };
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
