//! Ending a collective from outside its thread, and the bell that wakes it.
//!
//! Each mesh has one bell, an eventfd. Whoever aborts rings it, and so do ranks that are threads of
//! the same process when they have moved bytes of a sleeping rank.

use crate::Error;
use crate::poll;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// A file descriptor that is readable from `ring` until `hush`.
#[derive(Debug)]
pub(crate) struct Bell(File);

impl Bell {
    pub fn new() -> Result<Self, Error> {
        // SAFETY: eventfd takes two numbers and touches no memory of ours.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(Error::os("eventfd", &std::io::Error::last_os_error()));
        }
        // SAFETY: fd was just returned to us and nobody else owns it.
        Ok(Self(File::from(unsafe { OwnedFd::from_raw_fd(fd) })))
    }

    pub fn ring(&self) {
        // The only refusal, a full counter, means that the bell rings already.
        let _ = (&self.0).write(&1u64.to_ne_bytes());
    }

    pub fn hush(&self) {
        let _ = (&self.0).read(&mut [0; 8]);
    }

    pub fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// Makes the running and every later operation of one mesh fail, from any thread.
#[derive(Clone, Debug)]
pub struct AbortHandle(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    set: AtomicBool,
    reason: Mutex<String>,
    bell: Arc<Bell>,
}

impl AbortHandle {
    pub fn new() -> Result<Self, Error> {
        let bell = Arc::new(Bell::new()?);
        Ok(Self(Arc::new(Shared { set: AtomicBool::new(false), reason: Mutex::default(), bell })))
    }

    /// The first reason stays; later calls change nothing.
    pub fn abort(&self, reason: &str) {
        {
            let mut kept = self.0.reason.lock().unwrap_or_else(PoisonError::into_inner);
            if !self.0.set.load(Ordering::Relaxed) {
                *kept = reason.to_owned();
                self.0.set.store(true, Ordering::Release);
            }
        }
        self.0.bell.ring();
    }

    pub fn is_aborted(&self) -> bool {
        self.0.set.load(Ordering::Acquire)
    }

    /// `Error::Aborted` once `abort` was called.
    pub fn check(&self) -> Result<(), Error> {
        if !self.is_aborted() {
            return Ok(());
        }
        let reason = self.0.reason.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Err(Error::Aborted { reason })
    }

    pub(crate) fn bell(&self) -> &Arc<Bell> {
        &self.0.bell
    }

    /// Sleeps, but not past an abort.
    pub(crate) fn pause(&self, at_most: Duration) {
        poll::poll(&mut [poll::watch(self.0.bell.fd(), poll::POLLIN)], at_most);
        if !self.is_aborted() {
            self.0.bell.hush();
        }
    }
}
