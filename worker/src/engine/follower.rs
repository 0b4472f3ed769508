//! The loop of every rank but the lead: do what the plan says until it says leave.

use std::time::Duration;

use super::rank::Rank;
use super::step::{Kind, StepPlan};
use super::{Error, lead};
use crate::metrics::Figures;

/// How long a follower waits for the next plan: many heartbeats.
pub const PLAN_WAIT: Duration = Duration::from_secs(10);

const _: () = assert!(PLAN_WAIT.as_millis() >= 10 * lead::HEARTBEAT.as_millis());

/// Follows until the lead leaves.
///
/// # Errors
/// The epoch is over for another reason.
pub fn run(rank: &mut Rank, figures: &Figures) -> Result<(), Error> {
    let mut plan = StepPlan::with_room(rank.limits());
    loop {
        rank.follow(&mut plan, PLAN_WAIT)?;
        match plan.kind {
            Kind::Run => {
                rank.end_step(&plan);
                figures.stepped(0);
            }
            Kind::Rows | Kind::Heartbeat => {}
            Kind::Leave => return Ok(()),
        }
    }
}
