//! From load reports to the figures that metrics show and the recent steps that `balance.rs`
//! judges. A report of another epoch says nothing of this one.

use std::sync::Arc;

use super::balance::Recent;
use super::records::{self, Group, GroupState, Load};
use super::state::State;
use crate::group::figures::{self, Histogram, Timeline};

/// More buckets than any worker has.
const MAX_BUCKETS: usize = 128;

/// Of all groups that form or serve.
pub(super) fn groups(state: &State) -> Vec<figures::Group> {
    let own = state.groups.values().filter_map(|live| live.formation.as_ref());
    let own = own.map(|formation| &formation.record);
    let theirs = state.view.groups.values().filter(|record| !state.groups.contains_key(&record.id));
    let mut groups: Vec<&Group> = own.chain(theirs).collect();
    groups.retain(|record| record.state != GroupState::Retired);
    groups.sort_by(|a, b| a.id.cmp(&b.id));
    groups.into_iter().map(|record| group(state, record)).collect()
}

fn group(state: &State, record: &Group) -> figures::Group {
    let loads: Vec<Option<&Load>> = loads(state, record).collect();
    let rank = |(rank, load): (usize, &Option<&Load>)| {
        let load = (*load)?;
        Some(figures::Rank {
            rank,
            resident_weight_bytes: load.resident_weight_bytes,
            rss_bytes: load.rss_bytes,
            timeline: load.timeline.as_ref().and_then(timeline),
        })
    };
    figures::Group {
        id: record.id.clone(),
        model: record.model.clone(),
        is_ready: record.state == GroupState::Ready,
        lead: loads.first().copied().flatten().map(lead),
        ranks: loads.iter().enumerate().filter_map(rank).collect(),
    }
}

/// By rank: what its worker last said, if that was as a member of this epoch.
fn loads<'a>(state: &'a State, record: &'a Group) -> impl Iterator<Item = Option<&'a Load>> {
    record.members.iter().map(|member| {
        let load = state.view.loads.get(&member.worker);
        load.filter(|load| load.epoch == record.epoch.get())
    })
}

fn lead(load: &Load) -> figures::Lead {
    let timeline = load.timeline.as_ref();
    figures::Lead {
        n_running: load.running,
        n_waiting: load.waiting,
        kv_blocks_total: load.kv_blocks_total,
        kv_blocks_free: load.kv_blocks_free,
        kv_blocks_cached: load.kv_blocks_cached,
        tokens_total: load.tokens_total,
        preemptions_total: load.preemptions_total,
        prompt_tokens_total: load.prompt_tokens_total,
        cached_tokens_total: load.cached_tokens_total,
        drafted_total: load.drafted_total,
        drafts_right_total: load.drafts_right_total,
        queue: timeline.and_then(|t| histogram(&bounds(t)?, t.queue.as_ref())),
    }
}

fn timeline(told: &records::Timeline) -> Option<Timeline> {
    let bounds = bounds(told)?;
    Some(Timeline {
        idle: histogram(&bounds, told.idle.as_ref())?,
        step: histogram(&bounds, told.step.as_ref())?,
        compute: histogram(&bounds, told.compute.as_ref())?,
        wait: histogram(&bounds, told.wait.as_ref())?,
        transfer: histogram(&bounds, told.transfer.as_ref())?,
        tokens: told.tokens,
        bytes_sent: told.bytes_sent,
        bytes_received: told.bytes_received,
    })
}

/// Seconds; none if they do not rise or are too many.
fn bounds(told: &records::Timeline) -> Option<Arc<[f64]>> {
    let bounds = &told.bounds_us;
    let are_bounds = bounds.len() < MAX_BUCKETS && bounds.is_sorted_by(|a, b| a < b);
    are_bounds.then(|| bounds.iter().map(|&us| us as f64 / 1e6).collect())
}

fn histogram(bounds_s: &Arc<[f64]>, told: Option<&records::Histogram>) -> Option<Histogram> {
    let told = told.filter(|told| told.counts.len() == bounds_s.len() + 1)?;
    let (counts, sum_s) = (told.counts.clone(), told.sum_ns as f64 / 1e9);
    Some(Histogram { bounds_s: Arc::clone(bounds_s), counts, sum_s })
}

/// By rank: its share and its recent steps, if it told them.
pub(super) fn recent(state: &State, record: &Group) -> Vec<(u32, Option<Recent>)> {
    let shares = record.members.iter().map(|member| member.share);
    let recent = |load: Option<&Load>| {
        let told = load?.timeline.as_ref()?.recent?;
        Some(Recent {
            span_ms: told.span_ms,
            n_steps: told.steps,
            step_ns: told.step_ns,
            compute_ns: told.compute_ns,
            wait_ns: told.wait_ns,
            transfer_ns: told.transfer_ns,
        })
    };
    shares.zip(loads(state, record).map(recent)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timeline_is_believed_only_if_its_lengths_agree() {
        let histogram = || Some(records::Histogram { counts: vec![1, 2, 3], sum_ns: 500_000_000 });
        let told = records::Timeline {
            bounds_us: vec![1_000, 2_500_000],
            idle: histogram(),
            step: histogram(),
            compute: histogram(),
            wait: histogram(),
            transfer: histogram(),
            ..records::Timeline::default()
        };
        let got = timeline(&told).map(|timeline| timeline.wait);
        let bounds_s = Arc::from([0.001, 2.5]);
        assert_eq!(got, Some(Histogram { bounds_s, counts: vec![1, 2, 3], sum_s: 0.5 }));
        for bounds_us in [vec![1_000], vec![2, 1], vec![1, 1], (0..200).collect()] {
            assert!(timeline(&records::Timeline { bounds_us, ..told.clone() }).is_none());
        }
        assert!(timeline(&records::Timeline { wait: None, ..told }).is_none());
    }
}
