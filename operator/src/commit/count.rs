//! Whether enough people have approved. Pure: what the API server and the keys say of an approval is found out before.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use aether_api::approval::Decision;
use aether_api::commit::Approvals;
use aether_api::review::ReviewRule;
use jiff::Timestamp;

/// An approval, and what is known of it.
#[derive(Clone, Debug)]
pub(super) struct Ballot {
    /// The object's name.
    pub name: String,
    /// Who says it.
    pub username: String,
    /// The groups that they are in.
    pub groups: Vec<String>,
    /// What they say.
    pub decision: Decision,
    /// Of which tree.
    pub root: String,
    /// When it was made.
    pub made: Timestamp,
    /// Whether the operator signed it and the reviewer may approve; else why not.
    pub standing: Result<(), String>,
}

/// What is committed, and by which rule.
#[derive(Clone, Debug)]
pub(super) struct Matter<'a> {
    /// The rule of the source.
    pub rule: &'a ReviewRule,
    /// The tree.
    pub root: &'a str,
    /// Who made it.
    pub makers: &'a [String],
    /// Of what the maker is not known.
    pub unknown_makers: &'a [String],
    /// What is missing beside approvals.
    pub missing: Vec<String>,
}

/// What has come of it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Count {
    /// For the commit's status.
    pub approvals: Approvals,
    /// By approval, why it does not count.
    pub verdicts: BTreeMap<String, Result<(), String>>,
    /// When the first approval that counts expires.
    pub expires: Option<Timestamp>,
}

impl Count {
    /// Whether the commit may go.
    pub(super) fn is_released(&self) -> bool {
        self.approvals.missing.is_empty() && self.approvals.rejected.is_empty()
    }
}

/// Counts.
pub(super) fn count(matter: Matter<'_>, ballots: &[Ballot], now: Timestamp) -> Count {
    let Matter { rule, root, makers, unknown_makers, mut missing } = matter;
    let expiry = |ballot: &Ballot| {
        let after = rule.expire_after.filter(|after| !after.is_negative()).map(Duration::from)?;
        ballot.made.checked_add(after).ok()
    };
    let verdict = |ballot: &Ballot| -> Result<(), String> {
        ballot.standing.clone()?;
        if ballot.decision == Decision::Reject {
            return Ok(());
        }
        if ballot.root != root {
            return Err(format!("it is of tree {}, and the commit is of {root}", ballot.root));
        }
        if !rule.allow_self {
            if makers.contains(&ballot.username) {
                return Err("it is of one's own work".into());
            }
            if let Some(unknown) = unknown_makers.first() {
                return Err(format!("it may be of one's own work: {unknown}"));
            }
        }
        match expiry(ballot) {
            Some(expiry) if expiry <= now => Err(format!("it has expired at {expiry}")),
            _ => Ok(()),
        }
    };
    let verdicts: BTreeMap<String, Result<(), String>> =
        ballots.iter().map(|ballot| (ballot.name.clone(), verdict(ballot))).collect();
    let counting = |decision| {
        let counts = |ballot: &&Ballot| ballot.decision == decision && verdicts[&ballot.name].is_ok();
        ballots.iter().filter(counts).collect::<Vec<_>>()
    };
    let approving = counting(Decision::Approve);
    // By name, so that nobody has two voices whatever their objects are called.
    let names = |ballots: &[&Ballot]| -> BTreeSet<String> { ballots.iter().map(|b| b.username.clone()).collect() };
    let (by, rejected) = (names(&approving), names(&counting(Decision::Reject)));
    let have = u32::try_from(by.len()).unwrap_or(u32::MAX);
    if have < rule.required {
        missing.push(more(rule.required - have, "approval"));
    }
    for group in &rule.groups {
        let of_group: Vec<&Ballot> =
            approving.iter().filter(|ballot| ballot.groups.contains(&group.name)).copied().collect();
        let members = u32::try_from(names(&of_group).len()).unwrap_or(u32::MAX);
        if members < group.required {
            missing.push(format!("{} of group {}", more(group.required - members, "approval"), group.name));
        }
    }
    if !rule.allow_self && rule.required > 0 {
        missing.extend(unknown_makers.iter().cloned());
    }
    let stale = |ballot: &&Ballot| ballot.decision == Decision::Approve && ballot.root != root;
    let approvals = Approvals {
        have,
        need: rule.required,
        by: by.into_iter().collect(),
        rejected: rejected.into_iter().collect(),
        missing,
        stale: ballots.iter().filter(stale).map(|ballot| ballot.name.clone()).collect(),
    };
    Count { approvals, expires: approving.iter().filter_map(|ballot| expiry(ballot)).min(), verdicts }
}

fn more(number: u32, what: &str) -> String {
    if number == 1 { format!("1 more {what}") } else { format!("{number} more {what}s") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use aether_api::review::GroupRule;
    use proptest::prelude::*;

    const NOW: i64 = 1_000_000;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn ballot(username: &str) -> Ballot {
        Ballot {
            name: format!("fix.{username}"),
            username: username.into(),
            groups: vec!["all".into()],
            decision: Decision::Approve,
            root: "aa/1".into(),
            made: at(NOW - 60),
            standing: Ok(()),
        }
    }

    fn matter<'a>(rule: &'a ReviewRule, makers: &'a [String]) -> Matter<'a> {
        Matter { rule, root: "aa/1", makers, unknown_makers: &[], missing: Vec::new() }
    }

    fn two() -> ReviewRule {
        ReviewRule { required: 2, ..ReviewRule::default() }
    }

    #[test]
    fn each_reason_not_to_count_is_told_and_keeps_the_commit() {
        let bob = || ballot("bob");
        let cases: [(&str, Ballot, &str); 5] = [
            ("unsigned", Ballot { standing: Err("it is not signed".into()), ..bob() }, "not signed"),
            ("another tree", Ballot { root: "bb/2".into(), ..bob() }, "bb/2"),
            ("a maker", ballot("agent"), "own work"),
            ("expired", Ballot { made: at(NOW - 3600), ..bob() }, "expired"),
            ("twice", Ballot { name: "fix.other".into(), ..ballot("jane") }, ""),
        ];
        let rule = ReviewRule { expire_after: Some("30m".parse().unwrap()), ..two() };
        let makers = ["agent".to_owned()];
        for (case, second, why) in cases {
            let counted = count(matter(&rule, &makers), &[ballot("jane"), second.clone()], at(NOW));
            assert!(!counted.is_released(), "{case}");
            assert_eq!(counted.approvals.by, ["jane"], "{case}");
            assert_eq!(counted.approvals.missing, ["1 more approval"], "{case}");
            match &counted.verdicts[&second.name] {
                Ok(()) => assert_eq!(case, "twice"),
                Err(said) => assert!(said.contains(why) && !why.is_empty(), "{case}: {said}"),
            }
        }
        let counted = count(matter(&rule, &makers), &[ballot("jane"), bob()], at(NOW));
        assert!(counted.is_released());
        assert_eq!((counted.approvals.have, counted.approvals.need), (2, 2));
        assert_eq!(counted.expires, Some(at(NOW - 60 + 1800)));
    }

    #[test]
    fn a_rejection_blocks_whatever_tree_it_names() {
        let rule = ReviewRule::default();
        for root in ["aa/1", "bb/2"] {
            let no = Ballot { decision: Decision::Reject, root: root.into(), ..ballot("bob") };
            let counted = count(matter(&rule, &[]), &[ballot("jane"), no.clone()], at(NOW));
            assert!(
                !counted.is_released() && counted.approvals.rejected == ["bob"] && counted.approvals.missing.is_empty()
            );
            let forged = Ballot { standing: Err("forged".into()), ..no };
            assert!(count(matter(&rule, &[]), &[ballot("jane"), forged], at(NOW)).is_released());
        }
    }

    #[test]
    fn groups_checks_and_unknown_makers() {
        let groups = vec![GroupRule { name: "release".into(), required: 1 }];
        let rule = ReviewRule { groups, ..ReviewRule::default() };
        let counted = count(matter(&rule, &[]), &[ballot("jane")], at(NOW));
        assert_eq!(counted.approvals.missing, ["1 more approval of group release"]);
        let member = Ballot { groups: vec!["release".into()], ..ballot("joe") };
        assert!(count(matter(&rule, &[]), std::slice::from_ref(&member), at(NOW)).is_released());
        let unchecked = Matter { missing: vec!["check tests".into()], ..matter(&rule, &[]) };
        assert!(!count(unchecked, std::slice::from_ref(&member), at(NOW)).is_released());
        let unknown = ["who made the session is not known".to_owned()];
        let open = Matter { unknown_makers: &unknown, ..matter(&rule, &[]) };
        let counted = count(open, std::slice::from_ref(&member), at(NOW));
        assert!(!counted.is_released() && counted.approvals.missing.contains(&unknown[0]));
        let lenient = ReviewRule { allow_self: true, ..rule.clone() };
        let open = Matter { unknown_makers: &unknown, ..matter(&lenient, &[]) };
        assert!(count(open, &[member], at(NOW)).is_released());
        assert!(count(matter(&ReviewRule { required: 0, ..ReviewRule::default() }, &[]), &[], at(NOW)).is_released());
    }

    fn ballots() -> impl Strategy<Value = Vec<Ballot>> {
        let one = (0..6usize, 0..3usize, any::<bool>(), 0..4u8, any::<bool>(), 0..5000i64, any::<bool>());
        let one = one.prop_map(|(user, name, no, other, signed, age, release)| Ballot {
            name: format!("fix.{user}.{name}"),
            username: format!("user-{user}"),
            groups: if release { vec!["release".into()] } else { Vec::new() },
            decision: if no && other == 1 { Decision::Reject } else { Decision::Approve },
            root: if other == 0 { "bb/2".into() } else { "aa/1".into() },
            made: at(NOW - age),
            standing: if signed { Ok(()) } else { Err("forged".into()) },
        });
        prop::collection::vec(one, 0..12)
    }

    proptest! {
        /// The model says it the other way round: from what one good voice is, and how many people have one.
        #[test]
        fn nothing_goes_without_enough_good_voices(
            ballots in ballots(), required in 0..4u32, group in 0..3u32, expires in any::<bool>(), allow_self in any::<bool>(),
            unknown in any::<bool>(), unchecked in any::<bool>(),
        ) {
            let rule = ReviewRule {
                required,
                groups: (group > 0).then(|| GroupRule { name: "release".into(), required: group }).into_iter().collect(),
                allow_self,
                expire_after: expires.then(|| "40m".parse().unwrap()),
                ..ReviewRule::default()
            };
            // The objects of one API server have different names.
            let ballots: Vec<Ballot> =
                ballots.into_iter().map(|b| (b.name.clone(), b)).collect::<BTreeMap<_, _>>().into_values().collect();
            let makers = ["user-0".to_owned(), "user-1".to_owned()];
            let unknown_makers: Vec<String> = unknown.then(|| "session".to_owned()).into_iter().collect();
            let missing = unchecked.then(|| "tests".to_owned()).into_iter().collect();
            let matter = Matter { rule: &rule, root: "aa/1", makers: &makers, unknown_makers: &unknown_makers, missing };
            let counted = count(matter, &ballots, at(NOW));
            let people = |release: bool| (0..6).filter(|user| {
                let name = format!("user-{user}");
                let own = !allow_self && (*user < 2 || unknown);
                !own && ballots.iter().any(|b| {
                    b.username == name && b.standing.is_ok() && b.decision == Decision::Approve && b.root == "aa/1"
                        && (!expires || b.made > at(NOW - 2400)) && (!release || b.groups == ["release"])
                })
            }).count() as u32;
            let vetoed = ballots.iter().any(|b| b.standing.is_ok() && b.decision == Decision::Reject);
            let enough = people(false) >= required && (group == 0 || people(true) >= group);
            let doubtful = unknown && !allow_self && required > 0;
            prop_assert_eq!(counted.is_released(), enough && !vetoed && !unchecked && !doubtful);
            prop_assert_eq!(counted.approvals.have, people(false));
        }
    }
}
