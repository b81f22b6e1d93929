//! The audit finds what is wrong, and says what it has looked at when nothing is.

use memcg_core::audit::{Finding, VmFacts, tree, vms};
use memcg_core::tree::{Accounting, Counter, Kind, LimitPatch, Mode, NodeId, Overhead, Tree, Violation};
use memcg_core::units::{Limit, Pages};

fn healthy() -> VmFacts {
    VmFacts {
        name: "web".to_owned(),
        accounted: true,
        charged: Pages(1000),
        vmm: Pages(100),
        store: Pages(20),
        outstanding: Pages(880),
        in_flight: Pages(8),
        guest: Pages(700),
        stock: Pages(43),
        reserve: Pages(129),
        resident: Some(Pages(700)),
    }
}

fn accounted(host: &mut Tree, max: Limit) -> NodeId {
    let limits = LimitPatch { max: Some(max), ..LimitPatch::default() };
    host.add_with(host.root(), "web", &limits, Accounting::On).expect("added")
}

/// The names of the findings that are bad.
fn bad(findings: &[Finding]) -> Vec<&'static str> {
    findings.iter().filter(|finding| !finding.ok).map(|finding| finding.name).collect()
}

#[test]
fn a_healthy_host_is_described() {
    let mut host = Tree::new(Limit::Pages(Pages(4096)));
    let vm = accounted(&mut host, Limit::Max);
    let _ = host.try_charge_as(vm, Kind::Overhead(Overhead::Worker), Pages(256), Mode::Wait).expect("fits");
    let findings = tree(&host, &host.check());
    assert_eq!(bad(&findings), [""; 0]);
    assert_eq!(findings.iter().map(|f| f.name).collect::<Vec<_>>(), ["limits", "overhead", "sums", "counters"]);
    assert!(findings[1].message.contains("1M of 1M"), "{findings:?}");
    let findings = vms(&[healthy()]);
    assert_eq!(bad(&findings), [""; 0]);
    assert!(findings[2].message.starts_with("1 VM: 700 pages charged"), "{findings:?}");
}

/// What could not be refused is no violation: what is above the limit is reported.
#[test]
fn an_overcharge_that_is_reported_is_none() {
    let mut host = Tree::new(Limit::Max);
    let vm = accounted(&mut host, Limit::Pages(Pages(60)));
    let _ = host.try_charge(vm, Pages(100), Mode::NoFail).expect("never refused");
    let findings = tree(&host, &host.check());
    assert_eq!(bad(&findings), [""; 0]);
    assert!(findings[0].message.contains("overcharge 40 pages, reported"), "{findings:?}");
}

#[test]
fn each_violation_of_the_tree_is_under_its_name() {
    let host = Tree::new(Limit::Max);
    let (path, n, counter) = (|| "/web".to_owned(), Pages(7), Counter::Memory);
    for (name, violation) in [
        ("limits", Violation::OverLimit { path: path(), usage: n, overcharge: Pages(2) }),
        ("overhead", Violation::VmmAboveMemory { path: path(), vmm: n, memory: Pages(2) }),
        ("overhead", Violation::Parts { path: path(), memory: n, vmm: n, parts: n, store: n }),
        ("sums", Violation::Sum { path: path(), counter, usage: n, sum: Pages(2) }),
        ("sums", Violation::Returning { path: path(), returning: n, sum: Pages(2) }),
        ("sums", Violation::Orphan { path: path() }),
        ("counters", Violation::Underflow { path: path(), counter, count: 7 }),
        ("counters", Violation::Peak { path: path(), counter }),
    ] {
        let findings = tree(&host, std::slice::from_ref(&violation));
        assert_eq!(bad(&findings), [name]);
        assert!(findings.iter().any(|finding| finding.message == violation.to_string()), "{findings:?}");
    }
}

#[test]
fn each_thing_that_is_wrong_is_found_by_its_name() {
    type Break = fn(&mut VmFacts);
    let cases: [(&str, Break, &str); 5] = [
        ("charges", |vm| vm.outstanding = Pages(881), "1000 pages are charged, 881 pages are granted"),
        ("parts", |vm| vm.stock = Pages(44), "stock 44 pages, reserve 129 pages"),
        // More in use than is charged: nothing is left for stock and reserve, whatever is said of them.
        (
            "parts",
            |vm| {
                (vm.guest, vm.resident) = (Pages(900), Some(Pages(900)));
                (vm.stock, vm.reserve, vm.in_flight) = (Pages(0), Pages(0), Pages(0));
            },
            "guest 900 pages",
        ),
        ("resident", |vm| vm.resident = Some(Pages(701)), "700 pages are charged to the guest, 701 pages of its RAM"),
        ("resident", |vm| vm.resident = Some(Pages(699)), "699 pages of its RAM"),
    ];
    for (name, breaks, part) in cases {
        let mut vm = healthy();
        breaks(&mut vm);
        let findings = vms(&[healthy(), vm]);
        assert_eq!(bad(&findings), [name]);
        let message = &findings.iter().find(|finding| !finding.ok).expect("one is bad").message;
        assert!(message.starts_with("web: ") && message.contains(part), "{name}: {message}");
    }
}

#[test]
fn what_could_not_be_counted_is_said_and_is_no_violation() {
    let findings = vms(&[healthy(), VmFacts { resident: None, ..healthy() }, VmFacts::default()]);
    assert_eq!(bad(&findings), [""; 0]);
    assert!(findings[2].message.ends_with("1 VM never stood still and could not be counted"), "{findings:?}");
    assert!(findings[0].message.starts_with("2 VMs"), "one that is not accounted has nothing to add up");
}

#[test]
fn a_long_list_is_counted() {
    let violations: Vec<_> = (0..10).map(|n| format!("v{n}")).collect();
    let finding = Finding::new("x", "", &violations);
    assert_eq!((finding.ok, finding.message.as_str()), (false, "v0; v1; v2; and 7 more"));
}

/// What was on its way at one look and had arrived at the next was never wrong; what stays wrong may have other numbers.
#[test]
fn what_is_wrong_at_each_look_is_found() {
    let look =
        |violations: &[&str]| Finding::new("x", "all", &violations.iter().map(|v| (*v).to_owned()).collect::<Vec<_>>());
    let first = look(&["web: 3 pages too many", "db: gone"]);
    let second = look(&["web: 5 pages too many", "new: gone"]).since(&first);
    assert_eq!((second.ok, second.message.as_str()), (false, "web: 5 pages too many"));
    let third = look(&["new: gone", "db: gone"]).since(&second);
    assert_eq!((third.ok, third.message.as_str()), (true, "all"));
}
