//! Who waits for whom in a group, and which shares would end that. Pure.
//!
//! A step is as slow as the rank that computes longest; the others wait for it. What a rank
//! computes grows with its share, so its speed is share over time, and shares in the ratio of the
//! speeds would have all compute equally long. Only small whole numbers are proposed, and only where
//! they make steps noticeably shorter. What all ranks wait alike (for the network) is nobody's
//! fault and blamed on nobody.

use serde_json::{Value, json};

/// Steps that say something.
const MIN_STEPS: u64 = 10;
/// Shorter steps than by this are not worth loading weights anew.
const MIN_GAIN: f64 = 0.05;
/// Largest share that is proposed: heads and columns are dealt out no finer.
const MAX_SHARE: u32 = 8;
/// Larger numbers are proposed only if they bring as much more.
const WORTH: f64 = 0.01;

/// What one rank did of late: sums over steps.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Recent {
    /// Over this long.
    pub(super) span_ms: u32,
    pub(super) n_steps: u64,
    pub(super) step_ns: u64,
    pub(super) compute_ns: u64,
    pub(super) wait_ns: u64,
    pub(super) transfer_ns: u64,
}

/// What there is to say of a group.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Verdict {
    /// One rank waits for nobody.
    Alone,
    /// A rank has not reported.
    Unknown {
        rank: usize,
    },
    NoSteps,
    TooFew {
        n_steps: u64,
    },
    Judged(Judgement),
}

#[derive(Debug, Clone, PartialEq)]
pub(super) struct Judgement {
    pub(super) ranks: Vec<Rank>,
    /// The rank that computes longest, and how much of the time the one that waits most waits
    /// beyond it.
    pub(super) waited_for: (usize, f64),
    pub(super) proposal: Option<Proposal>,
}

/// Of an average step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Rank {
    pub(super) share: u32,
    pub(super) step_ms: f64,
    pub(super) compute_ms: f64,
    pub(super) transfer_ms: f64,
    /// Of the step: waiting for others.
    pub(super) wait: f64,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) struct Proposal {
    pub(super) shares: Vec<u32>,
    /// By how much of itself a step would be shorter.
    pub(super) gain: f64,
}

/// `ranks`: the share of each and its recent steps, if they are known.
pub(super) fn judge(ranks: &[(u32, Option<Recent>)]) -> Verdict {
    if ranks.len() < 2 {
        return Verdict::Alone;
    }
    if let Some(rank) = ranks.iter().position(|(_, recent)| recent.is_none()) {
        return Verdict::Unknown { rank };
    }
    let told = || ranks.iter().filter_map(|&(share, recent)| Some((share, recent?)));
    let n_steps = told().map(|(_, recent)| recent.n_steps).min().unwrap_or(0);
    match n_steps {
        0 => return Verdict::NoSteps,
        n_steps if n_steps < MIN_STEPS => return Verdict::TooFew { n_steps },
        _ => {}
    }
    let ranks: Vec<Rank> = told().map(|(share, recent)| rank(share, &recent)).collect();
    let slowest = |a: &usize, b: &usize| ranks[*a].compute_ms.total_cmp(&ranks[*b].compute_ms);
    let slowest = (0..ranks.len()).rev().max_by(slowest).expect("there are two or more");
    let longest = ranks.iter().map(|rank| rank.wait).fold(0.0, f64::max);
    let waited_for = (slowest, (longest - ranks[slowest].wait).max(0.0));
    let proposal = propose(&ranks);
    Verdict::Judged(Judgement { ranks, waited_for, proposal })
}

fn rank(share: u32, recent: &Recent) -> Rank {
    let per_step = |ns: u64| ns as f64 / 1e6 / recent.n_steps as f64;
    Rank {
        share,
        step_ms: per_step(recent.step_ns),
        compute_ms: per_step(recent.compute_ns),
        transfer_ms: per_step(recent.transfer_ns),
        wait: recent.wait_ns as f64 / recent.step_ns.max(1) as f64,
    }
}

/// The smallest shares that come close to the best there are, if they gain enough.
fn propose(ranks: &[Rank]) -> Option<Proposal> {
    let total: u32 = ranks.iter().map(|rank| rank.share).sum();
    // What the whole model would take each rank alone.
    let alone: Vec<f64> = ranks
        .iter()
        .map(|rank| rank.compute_ms * f64::from(total) / f64::from(rank.share.max(1)))
        .collect();
    let longest = |shares: &[u32]| {
        let total: u32 = shares.iter().sum();
        let part = |(&share, alone): (&u32, &f64)| f64::from(share) / f64::from(total) * alone;
        shares.iter().zip(&alone).map(part).fold(0.0, f64::max)
    };
    let now = ranks.iter().map(|rank| rank.compute_ms).fold(0.0, f64::max);
    let step = ranks.iter().map(|rank| rank.step_ms).fold(0.0, f64::max);
    let quickest = alone.iter().copied().fold(f64::INFINITY, f64::min);
    if !(quickest > 0.0 && step > 0.0) {
        return None;
    }
    let mut best: Option<Proposal> = None;
    for largest in 1..=MAX_SHARE {
        // A rank that is left out is no proposal: it would hold nothing.
        let share = |alone: &f64| {
            ((quickest / alone * f64::from(largest)).round() as u32).clamp(1, MAX_SHARE)
        };
        let shares: Vec<u32> = alone.iter().map(share).collect();
        let gain = (now - longest(&shares)) / step;
        if gain > best.as_ref().map_or(MIN_GAIN, |best| best.gain + WORTH) {
            best = Some(Proposal { shares, gain });
        }
    }
    best
}

impl Verdict {
    /// One or two sentences for people.
    pub(super) fn sentence(&self) -> String {
        match self {
            Self::Alone => "one rank waits for nobody".to_owned(),
            Self::Unknown { rank } => format!("rank {rank} has not told its timings yet"),
            Self::NoSteps => "no steps of late".to_owned(),
            Self::TooFew { n_steps } => {
                format!("only {n_steps} steps of late: too few to judge by")
            }
            Self::Judged(judgement) => judgement.sentence(),
        }
    }

    /// For the status page.
    pub(super) fn page(&self) -> Value {
        let (state, judged) = match self {
            Self::Alone => ("alone", None),
            Self::Unknown { .. } => ("unknown", None),
            Self::NoSteps | Self::TooFew { .. } => ("no_steps", None),
            Self::Judged(judged) if judged.proposal.is_some() => ("uneven", Some(judged)),
            Self::Judged(judged) => ("balanced", Some(judged)),
        };
        let rounded = |x: f64| (x * 1e4).round() / 1e4;
        let rank = |(rank, it): (usize, &Rank)| {
            json!({
                "rank": rank,
                "share": it.share,
                "step_ms": rounded(it.step_ms),
                "compute_ms": rounded(it.compute_ms),
                "transfer_ms": rounded(it.transfer_ms),
                "wait": rounded(it.wait),
            })
        };
        let proposal = judged.and_then(|judged| judged.proposal.as_ref());
        json!({
            "state": state,
            "verdict": self.sentence(),
            "ranks": judged.map_or(Vec::new(), |judged| judged.ranks.iter().enumerate().map(rank).collect()),
            "waited_for": judged.map(|judged| {
                json!({ "rank": judged.waited_for.0, "wait": rounded(judged.waited_for.1) })
            }),
            "proposed_shares": proposal.map(|proposal| proposal.shares.clone()),
            "gain": proposal.map(|proposal| rounded(proposal.gain)),
        })
    }
}

impl Judgement {
    fn sentence(&self) -> String {
        let percent = |x: f64| format!("{:.0} %", 100.0 * x);
        let waits = |(rank, it): (usize, &Rank)| match rank {
            0 => format!("rank 0 waits {}", percent(it.wait)),
            rank => format!("rank {rank} {}", percent(it.wait)),
        };
        let waits: Vec<String> = self.ranks.iter().enumerate().map(waits).collect();
        let waits = waits.join(", ");
        let (slowest, waited) = self.waited_for;
        match &self.proposal {
            None => format!("balanced: {waits} of the time"),
            Some(Proposal { shares, gain }) => {
                let shares: Vec<String> = shares.iter().map(u32::to_string).collect();
                format!(
                    "{waits} of the time; rank {slowest} is waited for {}: shares {} would balance \
                     (steps {} shorter)",
                    percent(waited),
                    shares.join(":"),
                    percent(*gain),
                )
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A step of as long as the slowest computes and 1 ms in which all wait for the network.
    fn steps(ranks: &[(u32, f64)]) -> Vec<(u32, Option<Recent>)> {
        let longest = ranks.iter().map(|(_, ms)| *ms).fold(0.0, f64::max);
        let ns = |ms: f64| (100.0 * 1e6 * ms) as u64;
        let recent = |compute: f64| Recent {
            span_ms: 30_000,
            n_steps: 100,
            step_ns: ns(longest + 1.0),
            compute_ns: ns(compute),
            wait_ns: ns(longest - compute + 0.5),
            transfer_ns: ns(0.5),
        };
        ranks.iter().map(|&(share, compute)| (share, Some(recent(compute)))).collect()
    }

    /// Shares and what each rank computes in a step, in ms; the proposal.
    fn check(ranks: &[(u32, f64)], waited_for: usize, expect: Option<&[u32]>) {
        let Verdict::Judged(judged) = judge(&steps(ranks)) else { panic!("{ranks:?}") };
        assert_eq!(judged.waited_for.0, waited_for, "{ranks:?}");
        let shares = judged.proposal.as_ref().map(|proposal| proposal.shares.as_slice());
        assert_eq!(shares, expect, "{ranks:?}: {}", judged.sentence());
    }

    #[test]
    fn shares_are_proposed_in_the_ratio_of_the_speeds() {
        check(&[(1, 10.0), (1, 10.0)], 0, None);
        check(&[(3, 30.0), (1, 10.0)], 0, Some(&[1, 1]));
        check(&[(1, 10.0), (3, 30.0)], 1, Some(&[1, 1]));
        check(&[(1, 15.0), (1, 10.0)], 0, Some(&[2, 3]));
        check(&[(2, 20.0), (2, 30.0)], 1, Some(&[3, 2]));
        check(&[(1, 80.0), (1, 10.0)], 0, Some(&[1, 8]));
        check(&[(6, 60.0), (1, 10.0), (1, 10.0)], 0, Some(&[1, 1, 1]));
        check(&[(1, 10.0), (1, 20.0), (1, 40.0)], 2, Some(&[4, 2, 1]));
        // The best of small numbers is what stands already.
        check(&[(2, 20.0), (1, 20.0)], 0, None);
        // A little is not worth it.
        check(&[(1, 10.0), (1, 10.8)], 1, None);
        check(&[(20, 10.0), (19, 9.5)], 0, None);
        // A rank that is very slow keeps the smallest share.
        check(&[(1, 1.0), (1, 100.0)], 1, Some(&[8, 1]));
    }

    #[test]
    fn waiting_that_all_share_is_blamed_on_nobody() {
        let Verdict::Judged(judged) = judge(&steps(&[(1, 10.0), (1, 10.0)])) else { panic!() };
        assert_eq!(judged.waited_for.1, 0.0);
        assert_eq!(judged.sentence(), "balanced: rank 0 waits 5 %, rank 1 5 % of the time");
    }

    #[test]
    fn a_verdict_says_who_waits_for_whom_and_what_would_help() {
        let verdict = judge(&steps(&[(1, 15.0), (1, 9.0)]));
        assert_eq!(
            verdict.sentence(),
            "rank 0 waits 3 %, rank 1 41 % of the time; rank 0 is waited for 38 %: shares 3:5 would \
             balance (steps 23 % shorter)"
        );
        let page = verdict.page();
        assert_eq!(page["state"], "uneven");
        assert_eq!(page["waited_for"]["rank"], 0);
        assert_eq!(page["proposed_shares"], json!([3, 5]));
        assert_eq!(page["ranks"][1]["wait"], 0.4063);
    }

    #[test]
    fn what_is_not_known_is_not_judged() {
        let some = steps(&[(1, 10.0), (1, 10.0)]);
        let with = |n_steps| {
            let recent = Recent { n_steps, ..some[1].1.unwrap_or_default() };
            judge(&[some[0], (1, Some(recent))])
        };
        assert_eq!(judge(&some[..1]), Verdict::Alone);
        assert_eq!(judge(&[some[0], (1, None)]), Verdict::Unknown { rank: 1 });
        assert_eq!(with(0), Verdict::NoSteps);
        assert_eq!(with(9), Verdict::TooFew { n_steps: 9 });
        assert!(matches!(with(10), Verdict::Judged(_)));
        let idle = (1, Some(Recent { n_steps: 100, ..Recent::default() }));
        let verdict = judge(&[idle, idle]);
        assert!(
            matches!(verdict, Verdict::Judged(Judgement { proposal: None, .. })),
            "{verdict:?}"
        );
    }
}
