//! Child processes that never outlive this one, and what they say on stderr.
//!
//! The only file of the command line with `unsafe`: two system calls that the standard library
//! lacks. It knows processes and log lines, not what a coordinator or a worker is; `up/` does.

#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::Command;
use tokio::sync::mpsc;

/// Lines kept for the message when a child fails.
const TAIL_LINES: usize = 40;

/// What to start.
#[derive(Debug, Clone)]
pub struct Spec {
    /// Short; prefixes its log lines.
    pub name: String,
    pub args: Vec<OsString>,
    /// Receives everything it writes to stderr.
    pub log: PathBuf,
    /// Show every line here too, not only warnings and errors.
    pub verbose: bool,
}

/// How a child ended.
#[derive(Debug)]
pub struct Exit {
    pub name: String,
    pub status: std::io::Result<ExitStatus>,
    /// The error sentence it ended with, or its last lines.
    pub last_words: String,
}

/// A running child. Dropping it kills it.
#[derive(Debug)]
pub struct Child {
    signals: mpsc::Sender<i32>,
    hushed: Arc<AtomicBool>,
}

impl Child {
    /// Asks it to finish what runs and end.
    pub fn terminate(&self) {
        // A full or closed channel means that it has been asked already, or has ended.
        let _ = self.signals.try_send(libc::SIGTERM);
    }

    /// From now on its lines go to its log alone.
    pub fn hush(&self) {
        self.hushed.store(true, Ordering::Relaxed);
    }

    /// Ends it now.
    pub fn kill(&self) {
        let _ = self.signals.try_send(libc::SIGKILL);
    }
}

/// Starts this binary again with `spec.args`; its end is reported to `exits`.
///
/// Must be called from a thread that lives as long as the child may: the kernel ties the child's
/// life to it.
pub fn spawn(spec: &Spec, exits: mpsc::Sender<Exit>) -> anyhow::Result<Child> {
    let program = std::env::current_exe().context("the path of this program is unknown")?;
    let log = File::options().create(true).append(true).open(&spec.log);
    let log = log.with_context(|| format!("the log {} cannot be opened", spec.log.display()))?;
    let parent = std::process::id();
    let mut command = Command::new(program);
    command
        .args(&spec.args)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        // Its own process group: Ctrl-C on a terminal reaches the parent alone, which drains the
        // children in order.
        .process_group(0)
        .kill_on_drop(true);
    // Children get every option as a flag; the parent's environment must not add others.
    for (key, _) in std::env::vars_os() {
        if key.to_string_lossy().starts_with("EVENER_") {
            command.env_remove(key);
        }
    }
    // SAFETY: the closure runs between fork and exec and makes only async-signal-safe system calls.
    unsafe {
        command.pre_exec(move || die_with(parent));
    }
    let mut child =
        command.spawn().with_context(|| format!("{} could not be started", spec.name))?;
    let stderr = child.stderr.take().context("a child's stderr is missing")?;
    let name = spec.name.clone();
    let (signals, mut asked) = mpsc::channel::<i32>(4);
    let hushed = Arc::new(AtomicBool::new(false));
    let echo = Echo { name: name.clone(), verbose: spec.verbose, hushed: hushed.clone() };
    let pump = tokio::spawn(pump(stderr, log, echo));
    tokio::spawn(async move {
        let status = loop {
            tokio::select! {
                status = child.wait() => break status,
                signal = asked.recv() => match signal {
                    Some(signal) => send(child.id(), signal),
                    // The handle is gone, so nobody will ever ask again.
                    None => { let _ = child.start_kill(); break child.wait().await }
                },
            }
        };
        let last_words = pump.await.unwrap_or_default();
        let _ = exits.send(Exit { name, status, last_words }).await;
    });
    Ok(Child { signals, hushed })
}

/// Kills this process when the thread that started it ends.
fn die_with(parent: u32) -> std::io::Result<()> {
    // SAFETY: both calls take plain integers and touch no memory of ours.
    let (set, now) = unsafe {
        (libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as libc::c_ulong), libc::getppid())
    };
    if set != 0 {
        return Err(std::io::Error::last_os_error());
    }
    // The parent may have ended before the call above.
    if u32::try_from(now) != Ok(parent) {
        return Err(std::io::Error::from(std::io::ErrorKind::BrokenPipe));
    }
    Ok(())
}

/// Sends a signal to a child that has not been waited for, so that its id is still its own.
fn send(pid: Option<u32>, signal: i32) {
    if let Some(Ok(pid)) = pid.map(libc::pid_t::try_from) {
        // SAFETY: kill takes two integers.
        unsafe { libc::kill(pid, signal) };
    }
}

/// Copies lines to the log and, where people should see them, to our stderr. Returns the child's
/// last words.
async fn pump(stderr: impl AsyncRead + Unpin, mut log: File, echo: Echo) -> String {
    let mut lines = BufReader::new(stderr).split(b'\n');
    let mut tail: VecDeque<String> = VecDeque::with_capacity(TAIL_LINES);
    while let Ok(Some(line)) = lines.next_segment().await {
        let line = String::from_utf8_lossy(&line).into_owned();
        // A full disk must not stop the cluster.
        let _ = writeln!(log, "{line}");
        if echo.shows(&line) {
            eprintln!("{} | {line}", echo.name);
        }
        if tail.len() == TAIL_LINES {
            tail.pop_front();
        }
        tail.push_back(line);
    }
    last_words(&tail)
}

/// Which of a child's lines are shown here.
struct Echo {
    name: String,
    verbose: bool,
    hushed: Arc<AtomicBool>,
}

impl Echo {
    fn shows(&self, line: &str) -> bool {
        self.verbose || (!self.hushed.load(Ordering::Relaxed) && deserves_attention(line))
    }
}

/// Whether a log line is a warning or an error, or no log line at all (a panic, the linker, the
/// kernel).
fn deserves_attention(line: &str) -> bool {
    if line.starts_with(ERROR_PREFIX) {
        // Reported by the parent, with what it was doing.
        return false;
    }
    let level = line.split_ascii_whitespace().nth(1).unwrap_or_default();
    !matches!(level, "INFO" | "DEBUG" | "TRACE")
}

/// How `main` begins the sentence it ends with.
pub const ERROR_PREFIX: &str = "error: ";

fn last_words(tail: &VecDeque<String>) -> String {
    if let Some(line) = tail.iter().rev().find_map(|line| line.strip_prefix(ERROR_PREFIX)) {
        return line.to_owned();
    }
    let from = tail.len().saturating_sub(3);
    tail.iter().skip(from).map(|line| line.trim()).collect::<Vec<_>>().join("; ")
}

/// `exit code 1`, `signal 9`.
pub fn describe(status: &std::io::Result<ExitStatus>) -> String {
    use std::os::unix::process::ExitStatusExt;
    match status {
        Ok(status) => match (status.code(), status.signal()) {
            (Some(code), _) => format!("exit code {code}"),
            (None, Some(signal)) => format!("signal {signal}"),
            (None, None) => "no exit code".to_owned(),
        },
        Err(error) => format!("its end could not be read: {error}"),
    }
}

/// A new directory for the logs of one run.
pub fn log_dir(under: Option<&Path>) -> anyhow::Result<PathBuf> {
    let base = under.map_or_else(|| std::env::temp_dir().join("evener"), Path::to_owned);
    let stamp = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.as_millis());
    let dir = base.join(format!("up-{stamp}-{}", std::process::id()));
    std::fs::create_dir_all(&dir)
        .with_context(|| format!("the log directory {} cannot be made", dir.display()))?;
    Ok(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_lines_that_people_should_see_are_shown() {
        for (line, shown) in [
            ("2026-01-01T00:00:00Z  INFO evener: listening", false),
            ("2026-01-01T00:00:00Z DEBUG evener: detail", false),
            ("2026-01-01T00:00:00Z  WARN evener: step deadline missed", true),
            ("2026-01-01T00:00:00Z ERROR evener: broken", true),
            ("thread 'main' panicked at src/main.rs:1:1:", true),
            ("error: the port is in use", false),
        ] {
            assert_eq!(deserves_attention(line), shown, "{line}");
        }
    }

    #[test]
    fn last_words_are_the_error_sentence_if_there_is_one() {
        let lines = |lines: &[&str]| lines.iter().map(|l| (*l).to_owned()).collect();
        assert_eq!(last_words(&lines(&["a", "error: why", "noise"])), "why");
        assert_eq!(last_words(&lines(&["a", "b", "c", "d"])), "b; c; d");
        assert_eq!(last_words(&lines(&[])), "");
    }
}
