//! What workers report of their groups, as metrics: built anew for each scrape from the last
//! reports, so that a group that is gone leaves nothing behind.
//!
//! Labels are deployed models, groups and ranks; an epoch is none, so a counter may begin again.

use std::fmt;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, MetricEncoder};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Unit;
use tokio::sync::watch;

use crate::group::figures::{Group, Histogram, Lead, Rank, Timeline};

/// Shows the last figures at each scrape.
#[derive(Debug)]
pub(super) struct Groups(pub(super) watch::Receiver<Arc<[Group]>>);

type OfGroup<'a> = [(&'static str, &'a str); 2];
type OfBlocks<'a> = (OfGroup<'a>, [(&'static str, &'static str); 1]);
type OfRank<'a> = (OfGroup<'a>, [(&'static str, u32); 1]);

/// Name, help and unit of a metric.
type About = (&'static str, &'static str, Option<&'static Unit>);
/// A metric and where its value stands.
type Shown<T, V> = (About, fn(&T) -> V);
type ShownHistogram = (About, fn(&Timeline) -> &Histogram);

const SECONDS: Option<&Unit> = Some(&Unit::Seconds);
const BYTES: Option<&Unit> = Some(&Unit::Bytes);

impl Collector for Groups {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let groups = Arc::clone(&self.0.borrow());
        if groups.is_empty() {
            return Ok(()); // a family without members would be a help text without a metric
        }
        let mut page = Page { groups: &groups, encoder: &mut encoder };
        page.states()?;
        page.leads()?;
        page.ranks()
    }
}

struct Page<'a, 'e> {
    groups: &'a [Group],
    encoder: &'a mut DescriptorEncoder<'e>,
}

impl<'a> Page<'a, '_> {
    fn states(&mut self) -> fmt::Result {
        let help = "Whether a group takes requests (1) or forms (0)";
        let groups = self.groups;
        let mut family = self.family(("group_ready", help, None), MetricType::Gauge)?;
        for group in groups {
            family.encode_family(&of(group))?.encode_gauge(&i64::from(group.is_ready))?;
        }
        Ok(())
    }

    fn leads(&mut self) -> fmt::Result {
        let gauges: [Shown<Lead, u32>; 2] = [
            (("sequences_running", "Sequences that take part in steps", None), |it| it.n_running),
            (("sequences_waiting", "Sequences that wait for a place or KV blocks", None), |it| {
                it.n_waiting
            }),
        ];
        for (about, value) in gauges {
            let leads = self.with_leads();
            let mut family = self.family(about, MetricType::Gauge)?;
            for (labels, lead) in leads {
                family.encode_family(&labels)?.encode_gauge(&value(lead))?;
            }
        }
        self.kv_blocks()?;
        let counters: [Shown<Lead, u64>; 6] = [
            (("engine_tokens", "Tokens that leads generated", None), |it| it.tokens_total),
            (
                ("preemptions", "Sequences whose KV blocks were taken back as they ran", None),
                |it| it.preemptions_total,
            ),
            (
                ("prefix_query_tokens", "Tokens of prompts looked up in the prefix cache", None),
                |it| it.prompt_tokens_total,
            ),
            (("prefix_hit_tokens", "Tokens of prompts found in the prefix cache", None), |it| {
                it.cached_tokens_total
            }),
            (("draft_tokens", "Tokens drafted and verified", None), |it| it.drafted_total),
            (("draft_right_tokens", "Drafted tokens that were right", None), |it| {
                it.drafts_right_total
            }),
        ];
        for (about, value) in counters {
            let leads = self.with_leads();
            let mut family = self.family(about, MetricType::Counter)?;
            for (labels, lead) in leads {
                counter(&mut family, &labels, value(lead))?;
            }
        }
        let help = "From the arrival of a sequence at its lead to its first step";
        let leads = self.with_leads();
        let mut family = self.family(("queue", help, SECONDS), MetricType::Histogram)?;
        for (labels, lead) in leads {
            if let Some(queue) = &lead.queue {
                histogram(&mut family, &labels, queue)?;
            }
        }
        Ok(())
    }

    fn kv_blocks(&mut self) -> fmt::Result {
        let leads = self.with_leads();
        let help = "KV blocks of a group: used by sequences, cached for others, free";
        let mut family = self.family(("kv_blocks", help, None), MetricType::Gauge)?;
        for &(labels, lead) in &leads {
            let used = lead.kv_blocks_total.saturating_sub(lead.kv_blocks_free);
            let free = lead.kv_blocks_free.saturating_sub(lead.kv_blocks_cached);
            for (state, n) in [("used", used), ("cached", lead.kv_blocks_cached), ("free", free)] {
                let labels: OfBlocks<'_> = (labels, [("state", state)]);
                family.encode_family(&labels)?.encode_gauge(&n)?;
            }
        }
        let help = "Part of the KV blocks that sequences use";
        let mut family = self.family(("kv_usage_ratio", help, None), MetricType::Gauge)?;
        for (labels, lead) in leads {
            let used = lead.kv_blocks_total.saturating_sub(lead.kv_blocks_free);
            let ratio = f64::from(used) / f64::from(lead.kv_blocks_total.max(1));
            family.encode_family(&labels)?.encode_gauge(&ratio)?;
        }
        Ok(())
    }

    fn ranks(&mut self) -> fmt::Result {
        let histograms: [ShownHistogram; 5] = [
            (("step", "Steps: compute, wait and transfer", SECONDS), |it| &it.step),
            (("step_compute", "Of each step: outside the collective", SECONDS), |it| &it.compute),
            (
                ("step_wait", "Of each step: in the collective, a peer was not there", SECONDS),
                |it| &it.wait,
            ),
            (("step_transfer", "Of each step: in the collective, bytes moved", SECONDS), |it| {
                &it.transfer
            }),
            (("step_idle", "From the end of each step to the begin of the next", SECONDS), |it| {
                &it.idle
            }),
        ];
        for (about, value) in histograms {
            let ranks = self.with_ranks();
            let mut family = self.family(about, MetricType::Histogram)?;
            for (labels, rank) in ranks {
                if let Some(timeline) = &rank.timeline {
                    histogram(&mut family, &labels, value(timeline))?;
                }
            }
        }
        let counters: [Shown<Timeline, u64>; 3] = [
            (("step_tokens", "Tokens computed, prompts' included", None), |it| it.tokens),
            (("collective_sent", "Sent to other ranks", BYTES), |it| it.bytes_sent),
            (("collective_received", "Received from other ranks", BYTES), |it| it.bytes_received),
        ];
        for (about, value) in counters {
            let ranks = self.with_ranks();
            let mut family = self.family(about, MetricType::Counter)?;
            for (labels, rank) in ranks {
                if let Some(timeline) = &rank.timeline {
                    counter(&mut family, &labels, value(timeline))?;
                }
            }
        }
        let gauges: [Shown<Rank, u64>; 2] = [
            (("rank_weights", "Weights that a rank holds", BYTES), |it| it.resident_weight_bytes),
            (("rank_resident", "Resident memory of a rank's process", BYTES), |it| it.rss_bytes),
        ];
        for (about, value) in gauges {
            let ranks = self.with_ranks();
            let mut family = self.family(about, MetricType::Gauge)?;
            for (labels, rank) in ranks {
                family.encode_family(&labels)?.encode_gauge(&(value(rank) as f64))?;
            }
        }
        Ok(())
    }

    fn family(&mut self, about: About, kind: MetricType) -> Result<MetricEncoder<'_>, fmt::Error> {
        let (name, help, unit) = about;
        // As the registry writes those of its own.
        self.encoder.encode_descriptor(name, &format!("{help}."), unit, kind)
    }

    fn with_leads(&self) -> Vec<(OfGroup<'a>, &'a Lead)> {
        self.groups.iter().filter_map(|group| Some((of(group), group.lead.as_ref()?))).collect()
    }

    fn with_ranks(&self) -> Vec<(OfRank<'a>, &'a Rank)> {
        let of_group = |group: &'a Group| {
            let labels = of(group);
            group.ranks.iter().map(move |rank| ((labels, [("rank", rank.rank as u32)]), rank))
        };
        self.groups.iter().flat_map(of_group).collect()
    }
}

fn of(group: &Group) -> OfGroup<'_> {
    [("model", group.model.as_str()), ("group", group.id.as_str())]
}

fn counter(
    family: &mut MetricEncoder<'_>,
    labels: &impl EncodeLabelSet,
    value: u64,
) -> fmt::Result {
    family.encode_family(labels)?.encode_counter::<OfGroup<'_>, u64, u64>(&value, None)
}

fn histogram(
    family: &mut MetricEncoder<'_>,
    labels: &impl EncodeLabelSet,
    histogram: &Histogram,
) -> fmt::Result {
    let bounds = histogram.bounds_s.iter().copied().chain([f64::INFINITY]);
    let buckets: Vec<(f64, u64)> = bounds.zip(histogram.counts.iter().copied()).collect();
    let count = histogram.counts.iter().sum();
    family.encode_family(labels)?.encode_histogram::<OfGroup<'_>>(
        histogram.sum_s,
        count,
        &buckets,
        None,
    )
}
