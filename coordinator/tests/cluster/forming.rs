//! The supervisor among scripted workers: groups are formed, followed, retired, formed again, and taken over.

use evener_coordinator::config::Place;

use crate::support::{Coordinator, MODEL, deployment, options, until};
use crate::worker::{Call, Manner, ScriptedWorker};

fn joins(worker: &ScriptedWorker) -> Vec<u64> {
    let epoch = |call: Call| match call {
        Call::Join { epoch, .. } => Some(epoch),
        Call::Leave { .. } => None,
    };
    worker.calls().into_iter().filter_map(epoch).collect()
}

#[tokio::test]
async fn workers_that_hold_a_deployed_model_form_a_group_in_the_order_of_their_ids() {
    let mut coordinator = Coordinator::embedded(vec![deployment(Some(2), &[2, 1])]).await;
    coordinator.missing("none is registered yet").await;
    let registry = coordinator.registry();
    let mut w1 = ScriptedWorker::start("w1", &registry).await;
    coordinator.missing("wants 2 workers with shares 2:1, 1 holds it: w1").await;
    let w0 = ScriptedWorker::start("w0", &registry).await;
    let group = coordinator.ready("a group of both", |group| group.world_size == 2).await;
    assert_eq!(group.id.as_str(), "tiny:0");
    assert_eq!(group.lead_address, w0.address.to_string());
    assert_eq!((group.kv_blocks, group.kv_block_len, group.deterministic), (10, 16, true));
    let call = w1.called("a join", |call| matches!(call, Call::Join { .. })).await;
    let Call::Join { epoch, rank, members, shares, token } = call else { unreachable!() };
    assert_eq!((epoch, rank), (group.epoch.get(), 1));
    assert_eq!(members, ["w0", "w1"]);
    assert_eq!(shares, [2, 1]);
    assert_eq!(token.len(), 32);
    let directory = coordinator.directory.borrow().clone();
    assert!(directory.missing.is_empty(), "{:?}", directory.missing);
    let model = directory.models.values().next().unwrap();
    assert_eq!((model.name.as_str(), model.context_length), (MODEL, 512));
}
