//! `evener`: one binary, one file per verb. This file only names them.

mod bench;
mod chat;
mod children;
mod client;
mod coordinator;
mod doctor;
mod logging;
mod models;
mod options;
mod plan;
mod ports;
mod signals;
mod status;
mod table;
mod traces;
mod up;
mod values;
mod view;
mod worker;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};

const OVERVIEW: &str = "Examples:
  evener up --model model.gguf --shares 2:1    a whole cluster on this machine
  evener chat -p \"Hello!\"                      ask it
  evener status                                workers, ranks, shares, memory, load

Options come from flags, then from EVENER_* variables (named at each option), then from one TOML
file (--config PATH or EVENER_CONFIG) with a table for each verb:

  log = \"info\"
  [up]
  model = \"model.gguf\"
  shares = \"2:1\"

`evener VERB --print-config` shows the result as such a file.";

/// Serve open-weight language models sharded over unequal machines, behind the OpenAI API.
#[derive(Debug, Parser)]
#[command(name = "evener", version, after_help = OVERVIEW, max_term_width = 100)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Args)]
struct Global {
    /// TOML file with options, a table for each verb; flags and environment win over it.
    #[arg(long, global = true, env = "EVENER_CONFIG", value_name = "PATH")]
    config: Option<PathBuf>,
    /// Print the effective options as such a file, and end.
    #[arg(long, global = true)]
    print_config: bool,
    /// What is logged to standard error: error, warn, info, debug, trace, or target=level,...
    #[arg(long, global = true, env = "EVENER_LOG", value_name = "FILTER", default_value = "info")]
    log: String,
    /// Shape of log lines.
    #[arg(long, global = true, env = "EVENER_LOG_FORMAT", value_enum, default_value = "text")]
    log_format: logging::Format,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Start a whole cluster on this machine and serve a model
    Up(up::Options),
    /// Talk to a served model
    Chat(chat::Options),
    /// Show workers, groups and what is missing
    Status(status::Options),
    /// Measure decode speed, latency and memory bandwidth
    Bench(bench::Options),
    /// Show how a model would be split
    Plan(plan::Options),
    /// Show what this machine offers, and what that means for a worker
    Doctor(doctor::Options),
    /// Run the HTTP API, the router and the supervisor of groups
    Coordinator(coordinator::Options),
    /// Run one worker: one rank of a group
    Worker(worker::Options),
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}{}", children::ERROR_PREFIX, sentence(&error));
            ExitCode::FAILURE
        }
    }
}

/// An error and its causes; many of our errors already say what caused them.
fn sentence(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

fn run() -> anyhow::Result<()> {
    let args: Vec<OsString> = std::env::args_os().collect();
    let command = options::with_file(Cli::command(), &args)?;
    let matches = command.get_matches_from(args);
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    let Global { print_config, log, log_format, .. } = cli.global;
    if print_config {
        return match &cli.verb {
            Verb::Up(options) => options::print("up", options),
            Verb::Chat(options) => options::print("chat", options),
            Verb::Status(options) => options::print("status", options),
            Verb::Bench(options) => bench::print(options),
            Verb::Plan(options) => options::print("plan", options),
            Verb::Doctor(options) => options::print("doctor", options),
            Verb::Coordinator(options) => options::print("coordinator", options),
            Verb::Worker(options) => options::print("worker", options),
        };
    }
    match cli.verb {
        Verb::Up(options) => on_this_thread(up::run(options, &log)),
        Verb::Chat(options) => on_this_thread(chat::run(options)),
        Verb::Status(options) => on_this_thread(status::run(options)),
        Verb::Bench(options) => on_this_thread(bench::run(options, &log)),
        Verb::Plan(options) => plan::run(&options),
        Verb::Doctor(options) => doctor::run(&options),
        Verb::Coordinator(options) => {
            logging::start(&log, log_format)?;
            on_all_threads(coordinator::run(options))
        }
        Verb::Worker(options) => {
            logging::start(&log, log_format)?;
            on_all_threads(worker::run(options))
        }
    }
}

/// For verbs that start children: the kernel ties a child's life to the thread that started it, so
/// that must be the one that lives as long as the process.
fn on_this_thread(verb: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.context("the async runtime cannot be started")?;
    let result = runtime.block_on(verb);
    // A read of the terminal may still block a thread of the pool; the process ends without it.
    runtime.shutdown_background();
    result
}

fn on_all_threads(verb: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    runtime.context("the async runtime cannot be started")?.block_on(verb)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_cause_is_told_once() {
        let error = anyhow::anyhow!("the file is empty").context("x.gguf: the file is empty");
        assert_eq!(sentence(&error), "x.gguf: the file is empty");
        let error = anyhow::anyhow!("no space").context("the log cannot be written");
        assert_eq!(sentence(&error), "the log cannot be written: no space");
    }

    #[test]
    fn every_option_is_documented() {
        let command = Cli::command();
        for verb in command.get_subcommands() {
            assert!(verb.get_about().is_some(), "{} has no line of help", verb.get_name());
            for arg in verb.get_arguments().chain(command.get_arguments()) {
                assert!(arg.get_help().is_some(), "{} {}", verb.get_name(), arg.get_id());
            }
        }
    }
}
