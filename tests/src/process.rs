//! One process under test: its output kept, its end awaited with a deadline, its life ended on
//! drop.

use std::ffi::OsStr;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::{Child, Command};

use crate::within;

/// Environment variable by which everything that a test started can be found again.
const MARK: &str = "EVENERTEST_MARK";

/// A running process.
pub struct Process {
    name: String,
    child: Child,
    output: Output,
    pumps: Vec<tokio::task::JoinHandle<()>>,
}

/// How a process ended and what it said.
#[derive(Debug)]
pub struct Ended {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

#[derive(Clone, Default)]
struct Output {
    stdout: Arc<Mutex<String>>,
    stderr: Arc<Mutex<String>>,
}

impl Process {
    /// Starts `program`; `mark` tells its family of processes from all others.
    ///
    /// # Panics
    /// It cannot be started.
    #[must_use]
    pub fn start<A: AsRef<OsStr>>(name: &str, program: &Path, args: &[A], mark: &str) -> Self {
        let mut command = Command::new(program);
        command
            .args(args)
            .env(MARK, mark)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        for (key, _) in std::env::vars_os() {
            if key.to_string_lossy().starts_with("EVENER_") {
                command.env_remove(key);
            }
        }
        let mut child = command
            .spawn()
            .unwrap_or_else(|error| panic!("{} cannot be started: {error}", program.display()));
        let output = Output::default();
        let stdout = child.stdout.take().expect("stdout is piped");
        let stderr = child.stderr.take().expect("stderr is piped");
        let pumps = vec![
            tokio::spawn(pump(stdout, output.stdout.clone())),
            tokio::spawn(pump(stderr, output.stderr.clone())),
        ];
        Self { name: name.to_owned(), child, output, pumps }
    }

    /// What `probe` finds in what it wrote to standard output, once it is there.
    ///
    /// # Panics
    /// It ends first, or does not come in time.
    pub async fn prints<T>(
        &mut self,
        what: &str,
        deadline: Duration,
        probe: impl Fn(&str) -> Option<T>,
    ) -> T {
        let output = self.output.clone();
        self.lives_until(what, deadline, || {
            let found = probe(&text(&output.stdout));
            async move { found }
        })
        .await
    }

    /// What `probe` answers, once it does.
    ///
    /// # Panics
    /// This process ends first, or no answer comes in time; either way with all it said.
    pub async fn lives_until<T, F>(
        &mut self,
        what: &str,
        deadline: Duration,
        probe: impl FnMut() -> F,
    ) -> T
    where
        F: Future<Output = Option<T>>,
    {
        tokio::select! {
            found = within(deadline, probe) => found.unwrap_or_else(|| {
                panic!("{what}: not within {} s\n{}", deadline.as_secs(), self.report())
            }),
            ended = self.end() => {
                panic!("{} ended ({}), waited for: {what}\n{}", self.name, ended.status, self.report())
            }
        }
    }

    /// What it wrote to standard output so far.
    #[must_use]
    pub fn stdout(&self) -> String {
        text(&self.output.stdout)
    }

    /// What it wrote to standard error so far.
    #[must_use]
    pub fn stderr(&self) -> String {
        text(&self.output.stderr)
    }

    /// # Panics
    /// It has ended.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id().unwrap_or_else(|| panic!("{} has ended", self.name))
    }

    /// Asks it to finish and end.
    pub fn terminate(&self) {
        signal(self.pid(), "TERM");
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// It does not end in time.
    pub async fn ended(&mut self, deadline: Duration) -> Ended {
        let ended = tokio::time::timeout(deadline, self.end()).await;
        ended.unwrap_or_else(|_| {
            panic!("{} did not end within {} s\n{}", self.name, deadline.as_secs(), self.report())
        })
    }

    /// Waits for its end and for the last of its output.
    async fn end(&mut self) -> Ended {
        let status = self.child.wait().await.expect("a child can be waited for");
        for pump in self.pumps.drain(..) {
            // Output that a grandchild still holds open must not block the test.
            let _ = tokio::time::timeout(Duration::from_secs(2), pump).await;
        }
        Ended { status, stdout: self.stdout(), stderr: self.stderr() }
    }

    /// Everything it said, for a failed test.
    #[must_use]
    pub fn report(&self) -> String {
        format!(
            "--- {} stdout\n{}\n--- {} stderr\n{}\n",
            self.name,
            self.stdout(),
            self.name,
            self.stderr()
        )
    }
}

/// Sends a signal to any process; a process that is gone is none of our business.
pub(crate) fn signal(pid: u32, name: &str) {
    let kill = format!("kill -{name} {pid}");
    let status =
        std::process::Command::new("sh").args(["-c", &kill]).stderr(Stdio::null()).status();
    status.expect("sh can be started");
}

async fn pump(stream: impl AsyncRead + Unpin, into: Arc<Mutex<String>>) {
    let mut lines = BufReader::new(stream).split(b'\n');
    while let Ok(Some(line)) = lines.next_segment().await {
        let mut into = into.lock().expect("no one panics with it");
        into.push_str(&String::from_utf8_lossy(&line));
        into.push('\n');
    }
}

fn text(of: &Mutex<String>) -> String {
    of.lock().expect("no one panics with it").clone()
}

/// Command lines of the living processes that carry a mark.
#[must_use]
pub fn living_processes_marked(mark: &str) -> Vec<String> {
    let wanted = format!("{MARK}={mark}\0");
    let processes = std::fs::read_dir("/proc").expect("this is Linux");
    processes
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|process| {
            // Not ours to read, or already gone: not one of a test's children either.
            let environment = std::fs::read(process.join("environ")).unwrap_or_default();
            String::from_utf8_lossy(&environment).contains(&wanted)
        })
        .map(|process| {
            let line = std::fs::read(process.join("cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&line).replace('\0', " ")
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SOON;

    #[tokio::test]
    #[should_panic(expected = "the port is taken")]
    async fn a_process_that_ends_too_early_is_shown_with_all_it_said() {
        let script = ["-c", "echo serving soon; echo 'the port is taken' >&2; exit 1"];
        let mut process = Process::start("sh", Path::new("/bin/sh"), &script, "early");
        process.prints("a URL", SOON, |text| text.contains("http").then_some(())).await;
    }
}
