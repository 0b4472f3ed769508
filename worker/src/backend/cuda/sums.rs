//! Sums that the ranks' devices make among themselves: whether they can, and waiting for them with a
//! clock and an ear for the others.
//!
//! A device that waits for one that is gone waits for ever and says nothing. So whoever queued sums
//! looks at the device and at the collective in turn, until the one is done or the other has failed;
//! then the group of devices is left, which frees the queue.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use evener_collective::{Collective, Error as CollectiveError, Kind, Tag};
use evener_kernels::cuda::group::{Group, Id, Introduction};
use evener_kernels::cuda::{Buffer, Device, Error as DeviceError};

use crate::backend::Error;

/// Looks at the device between two at the collective, which are calls of the system.
const LOOKS: u32 = 64;
/// Sums queued before somebody looks whether they get done: a driver's queue is finite, and who fills
/// it waits without a clock.
const MOST_QUEUED: u32 = 32;

/// What a rank says of itself: version, card and whether others may share it, tokens of a step, and the
/// lead the group's name.
pub(super) fn introduction(about: Introduction, max_tokens: usize, id: Option<Id>) -> Vec<u8> {
    let mut bytes = about.version.to_le_bytes().to_vec();
    bytes.extend(about.card);
    bytes.push(about.shares.into());
    bytes.extend((max_tokens as u64).to_le_bytes());
    bytes.extend(id.iter().flat_map(|id| id.0));
    bytes
}

/// The group that ranks who said this can make, if they can: devices all, each its own where they may
/// not share one, with one version of the library, and steps padded alike.
pub(super) fn common(introductions: &[Vec<u8>]) -> Option<Id> {
    const CARD: std::ops::Range<usize> = 4..20;
    const SHARES: usize = 20;
    const ABOUT: usize = 29;
    let (lead, others) = introductions.split_first()?;
    let id = lead.get(ABOUT..)?.try_into().map(Id).ok()?;
    let mut cards = HashSet::from([&lead[CARD]]);
    let fits = |other: &&Vec<u8>| {
        other.len() == ABOUT
            && other[..4] == lead[..4]
            && other[CARD.end..] == lead[CARD.end..ABOUT]
    };
    let is_one = others
        .iter()
        .all(|other| fits(&other) && (cards.insert(&other[CARD]) || lead[SHARES] == 1));
    (is_one && !others.is_empty()).then_some(id)
}

/// Joins, or says why not. All ranks of the group do it at once.
///
/// # Errors
/// The device's, which leaves the collective as it was; or the collective's.
pub(super) fn join(
    device: &Device,
    id: &Id,
    tag: Tag,
    collective: &mut dyn Collective,
) -> Result<Result<Group, Error>, CollectiveError> {
    let joined = device.join(id, collective.rank(), collective.world_size());
    let group = match joined {
        Ok(group) => group,
        Err(error) => return Ok(Err(error.into())),
    };
    // Half of the time, so that some is left for telling the others.
    let within = collective.step_timeout() / 2;
    match watch(tag, within, collective, &mut || group.is_ready()) {
        Ok(()) => Ok(Ok(group)),
        Err(error) => collective.check().map(|()| Err(error)),
    }
}

/// The sums of one step.
pub(super) struct Sums<'a> {
    group: &'a Group,
    collective: &'a mut dyn Collective,
    step: u64,
    n_asked: u32,
}

impl<'a> Sums<'a> {
    pub(super) fn new(group: &'a Group, step: u64, collective: &'a mut dyn Collective) -> Self {
        Self { group, collective, step, n_asked: 0 }
    }

    /// Queues: the first `n` of `numbers` become those of all ranks added up.
    ///
    /// # Errors
    /// The device's, or the collective's while the device was slow to take it.
    pub(super) fn all_reduce(&mut self, numbers: &Buffer<f32>, n: usize) -> Result<(), Error> {
        self.n_asked += 1;
        self.group.all_reduce(numbers, n)?;
        self.watch(&mut |group| group.is_ready())
    }

    /// Waits now and then, so that the queue never fills. Not while the device records.
    pub(super) fn pace(&mut self) -> Result<(), Error> {
        match self.n_asked.is_multiple_of(MOST_QUEUED) {
            true => self.wait(),
            false => Ok(()),
        }
    }

    /// Until all that was asked of the device is done.
    ///
    /// # Errors
    /// The device's, or the collective's: a lost rank, an abort, or a deadline.
    pub(super) fn wait(&mut self) -> Result<(), Error> {
        self.watch(&mut |group| group.is_idle())
    }

    fn watch(
        &mut self,
        is_done: &mut dyn FnMut(&Group) -> Result<bool, DeviceError>,
    ) -> Result<(), Error> {
        let tag = Tag { step: self.step, op: self.n_asked };
        let within = self.collective.step_timeout();
        watch(tag, within, self.collective, &mut || is_done(self.group))
    }
}

/// Looks until `is_done`, the collective fails, or `within` is over.
fn watch(
    tag: Tag,
    within: Duration,
    collective: &mut dyn Collective,
    is_done: &mut dyn FnMut() -> Result<bool, DeviceError>,
) -> Result<(), Error> {
    let began = Instant::now();
    loop {
        for _ in 0..LOOKS {
            if is_done()? {
                return Ok(());
            }
            std::thread::yield_now();
        }
        collective.check()?;
        let waited = began.elapsed();
        if waited > within {
            let peers = (0..collective.world_size()).filter(|&rank| rank != collective.rank());
            let peers = peers.collect();
            return Err(
                CollectiveError::Timeout { kind: Kind::AllReduce, tag, waited, peers }.into()
            );
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use evener_collective::{Mesh, Options};
    use evener_kernels::cuda::group::ID_BYTES;

    fn said(version: u32, card: u8, max_tokens: usize, id: Option<u8>) -> Vec<u8> {
        let about = Introduction { version, card: [card; 16], shares: false };
        introduction(about, max_tokens, id.map(|byte| Id([byte; ID_BYTES])))
    }

    #[test]
    fn ranks_share_a_card_where_all_may() {
        let said = |shares, id: Option<u8>| {
            let about = Introduction { version: 23000, card: [1; 16], shares };
            introduction(about, 512, id.map(|byte| Id([byte; ID_BYTES])))
        };
        assert!(common(&[said(true, Some(7)), said(true, None)]).is_some());
        assert!(common(&[said(true, Some(7)), said(false, None)]).is_none());
        assert!(common(&[said(false, Some(7)), said(false, None)]).is_none());
    }

    #[test]
    fn ranks_of_cards_of_their_own_make_a_group() {
        let lead = || said(23000, 1, 512, Some(7));
        let check = |others: &[Vec<u8>], expect: bool| {
            let all: Vec<Vec<u8>> = [lead()].iter().chain(others).cloned().collect();
            assert_eq!(common(&all).map(|id| id.0[0]), expect.then_some(7), "{others:?}");
        };
        check(&[said(23000, 2, 512, None), said(23000, 3, 512, None)], true);
        check(&[], false); // alone
        check(&[Vec::new()], false); // a processor
        check(&[said(23000, 1, 512, None)], false); // the lead's card
        check(&[said(23000, 2, 512, None), said(23000, 2, 512, None)], false);
        check(&[said(22707, 2, 512, None)], false); // another library
        check(&[said(23000, 2, 256, None)], false); // steps padded otherwise
        check(&[said(23000, 2, 512, Some(8))], false); // two names
        assert!(common(&[Vec::new(), said(23000, 2, 512, None)]).is_none());
    }

    #[test]
    fn a_watch_ends_by_its_clock_and_by_an_abort() {
        let options = Options::default();
        let mut meshes = Mesh::local(2, 1, &options).unwrap();
        let mesh = &mut meshes[0];
        let tag = Tag { step: 3, op: 5 };
        let mut never = || Ok(false);
        let error = watch(tag, Duration::from_millis(5), mesh, &mut never).unwrap_err();
        let Error::Collective(CollectiveError::Timeout { tag: of, peers, .. }) = error else {
            panic!("{error}")
        };
        assert_eq!((of, peers), (tag, vec![1]));
        let hour = Duration::from_secs(3600);
        let mut lost = || Err(DeviceError::NoNccl);
        let error = watch(tag, hour, mesh, &mut lost).unwrap_err();
        assert!(matches!(error, Error::Device { .. }));
        mesh.abort_handle().abort("because");
        let error = watch(tag, hour, mesh, &mut never).unwrap_err();
        assert!(error.to_string().contains("because"), "{error}");
    }
}
