//! Packets: whatever a worker sends is a message or is not one, and what is one means the same when it is sent again.

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::super::*;
use super::{Case, Random, inputs, mutate, seed};
use crate::worker::protocol::{GuestStats, MAX_MESSAGE, VERSION, decode, encode};

/// One of each kind, with numbers that take from one to ten bytes.
fn examples() -> Vec<Vec<u8>> {
    let mut buffer = [0; MAX_MESSAGE];
    let message = "x".repeat(512);
    let report = Report { granted_total: u64::MAX, guest: 1 << 40, answers: Some(u32::MAX), ..Report::default() };
    let from = [
        FromWorker::Hello(Hello {
            ram: [RamSlot { gpa: 0, hva: u64::MAX, bytes: 4096, stage: 0 }; 2],
            report,
            ..hello(true)
        }),
        FromWorker::Report(report),
        FromWorker::Report(Report::default()),
        FromWorker::Activated { seq: 1, resident: 300, reserve_target: 70_000 },
        FromWorker::NotActivated { seq: 1, message: "no".to_owned() },
        FromWorker::Loaded { plan: 300 },
        FromWorker::GuestStats(GuestStats { values: [Some(u64::MAX); 16], age_ms: 1 }),
        FromWorker::Failed { message, smallest_max: Some(1) },
        FromWorker::Exited(ExitReason::Status(7)),
    ];
    let to = [
        ToWorker::Grant {
            epoch: 1,
            granted_total: 1 << 33,
            stock_max: 64,
            room: u64::MAX,
            swap_max: u64::MAX,
            store_max: 0,
            refused: true,
        },
        ToWorker::Activate { seq: 1, epoch: 1 },
        ToWorker::Pause { seq: u32::MAX },
        ToWorker::BalloonTarget { pages: 1 << 20 },
        ToWorker::Start,
    ];
    let mut examples: Vec<_> = from.iter().map(|message| encode(message, &mut buffer).to_vec()).collect();
    examples.extend(to.iter().map(|message| encode(message, &mut buffer).to_vec()));
    examples
}

/// True when the packet is a message of this kind.
fn understood<M: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(packet: &[u8]) -> bool {
    let Ok(message) = decode::<M>(packet) else { return false };
    let mut buffer = [0; MAX_MESSAGE];
    assert_eq!(decode::<M>(encode(&message, &mut buffer)), Ok(message));
    true
}

#[test]
fn every_packet_is_a_message_or_is_not_one() {
    let examples = examples();
    assert!(examples.iter().all(|packet| understood::<FromWorker>(packet) || understood::<ToWorker>(packet)));
    let count = inputs(20_000);
    let mut messages = 0;
    for number in 0..count {
        let mut random = Random::new(seed().wrapping_add(number));
        let mut packet = random.pick(&examples).clone();
        let other = random.pick(&examples);
        mutate(&mut packet, &mut random, &["\u{1}", "\u{0}\u{0}", "\u{7f}", "\u{80}", "xxxxxxxxxxxxxxxx"], other);
        if random.once_in(50) {
            packet.resize(random.below(MAX_MESSAGE + 100), random.next() as u8);
        }
        if let Some(version) = packet.first_mut()
            && !random.once_in(20)
        {
            *version = VERSION;
        }
        let _case = Case { kind: "packets", seed: seed().wrapping_add(number), input: &packet };
        messages += u64::from(understood::<FromWorker>(&packet) | understood::<ToWorker>(&packet));
    }
    println!("FUZZ packets inputs={count} messages={messages} garbage={}", count - messages);
    assert!(count < 1000 || (messages > count / 50 && messages < count), "inputs of one kind only");
}
