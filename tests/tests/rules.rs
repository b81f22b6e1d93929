//! Who is chosen when no memory is left, with real VMs: lines of the table that the simulator plays whole.

use ballast_tests::rules::play;
use memcg_core::sim::rules::Rule;

/// A test for each line, by its id; the table says what it proves.
macro_rules! lines {
    ($($name:ident $id:literal)*) => { $(
        #[test]
        fn $name() {
            play(Rule::find($id).expect("a line of the table"));
        }
    )* };
}

lines! {
    a_lower_priority_goes_first "lower-priority"
    who_is_to_be_avoided_goes_last "avoid-goes-last"
    nobody_goes_when_all_are_omitted "everybody-omits"
    a_vm_exactly_at_its_min_lives "exactly-at-min"
    what_low_protects_does_not_count "low-counts"
    two_groups_have_a_victim_each "two-groups-at-once"
    who_is_in_the_inner_group_goes "inner-group"
    a_vm_at_its_own_limit_goes_itself "own-limit"
    a_vm_at_its_own_limit_is_paused_though_that_frees_nothing "own-limit-pauses"
    a_client_decides "client-decides"
    a_client_that_is_late_does_not "client-is-late"
}
