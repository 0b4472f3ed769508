//! How options reach a verb: flags, then `EVENER_*`, then one TOML file, then the default.
//!
//! Each option is declared and documented once, as a field of its verb's `Options`. The file's
//! values are handed to clap as defaults, so that flags and environment win over them without a
//! second definition anywhere.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow, bail};
use clap::builder::OsStr;
use clap::{Arg, ArgAction, Command};
use serde::Serialize;

/// Variable that names the file where `--config` does not.
const CONFIG_VARIABLE: &str = "EVENER_CONFIG";

/// The file named by `--config` in `args`, or by `EVENER_CONFIG`.
fn config_path(args: &[OsString]) -> Option<PathBuf> {
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let text = arg.to_string_lossy();
        if text == "--" {
            break;
        }
        if text == "--config" {
            return args.next().map(PathBuf::from);
        }
        if let Some(path) = text.strip_prefix("--config=") {
            return Some(PathBuf::from(path));
        }
    }
    std::env::var_os(CONFIG_VARIABLE).filter(|path| !path.is_empty()).map(PathBuf::from)
}

/// `command` with the values of the TOML file, if one is named, as its defaults.
pub fn with_file(command: Command, args: &[OsString]) -> anyhow::Result<Command> {
    let Some(path) = config_path(args) else { return Ok(command) };
    let text = std::fs::read_to_string(&path)
        .with_context(|| format!("the configuration file {} cannot be read", path.display()))?;
    let file: toml::Table = text
        .parse()
        .with_context(|| format!("the configuration file {} is not valid TOML", path.display()))?;
    with_table(command, &path, file)
}

fn with_table(command: Command, path: &Path, table: toml::Table) -> anyhow::Result<Command> {
    table.into_iter().try_fold(command, |command, (key, value)| match value {
        toml::Value::Table(table) if command.has_subcommands() => {
            with_verb(command, path, &key, table)
        }
        value => with_default(command, path, &key, &value),
    })
}

fn with_verb(
    command: Command,
    path: &Path,
    verb: &str,
    table: toml::Table,
) -> anyhow::Result<Command> {
    if command.find_subcommand(verb).is_none() {
        let verbs: Vec<&str> = command.get_subcommands().map(Command::get_name).collect();
        bail!(
            "{}: the table [{verb}] names no verb; there are: {}",
            path.display(),
            verbs.join(", ")
        );
    }
    let mut failure = None;
    let command = command.mut_subcommand(verb, |subcommand| {
        let before = subcommand.clone();
        with_table(subcommand, path, table).unwrap_or_else(|error| {
            failure = Some(error);
            before
        })
    });
    failure.map_or(Ok(command), Err)
}

fn with_default(
    command: Command,
    path: &Path,
    key: &str,
    value: &toml::Value,
) -> anyhow::Result<Command> {
    let settable = |arg: &&Arg| {
        arg.get_long().is_some()
            && !matches!(arg.get_action(), ArgAction::Help | ArgAction::Version)
            && !matches!(arg.get_id().as_str(), "config" | "print_config")
    };
    let Some(id) = command
        .get_arguments()
        .filter(settable)
        .find(|arg| arg.get_long() == Some(key))
        .map(|arg| arg.get_id().clone())
    else {
        let known: Vec<&str> =
            command.get_arguments().filter(settable).filter_map(Arg::get_long).collect();
        bail!(
            "{}: `{key}` is not an option of `{}`; there are: {}",
            path.display(),
            command.get_name(),
            known.join(", ")
        );
    };
    let texts = texts_of(value).ok_or_else(|| {
        anyhow!(
            "{}: the value of `{key}` is neither text, number, true, false nor a list of them",
            path.display()
        )
    })?;
    Ok(command.mut_arg(id, |arg| arg.default_values(texts).required(false)))
}

/// The value as it would be written after a flag; one text per element of a list.
fn texts_of(value: &toml::Value) -> Option<Vec<OsStr>> {
    let text = |value: &toml::Value| match value {
        toml::Value::String(text) => Some(text.clone()),
        toml::Value::Integer(n) => Some(n.to_string()),
        toml::Value::Float(x) => Some(x.to_string()),
        toml::Value::Boolean(b) => Some(b.to_string()),
        _ => None,
    };
    // clap keeps defaults as 'static text; a configuration file is read once, so it may stay.
    let keep = |text: String| OsStr::from(&*Box::leak(text.into_boxed_str()));
    match value {
        toml::Value::Array(items) => items.iter().map(|item| text(item).map(keep)).collect(),
        value => text(value).map(|text| vec![keep(text)]),
    }
}

/// The effective options of a verb as a file that `--config` takes.
pub fn print<T: Serialize>(verb: &str, options: &T) -> anyhow::Result<()> {
    let table = std::collections::BTreeMap::from([(verb, options)]);
    print!("{}", toml::to_string(&table).context("the options cannot be written as TOML")?);
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn command() -> Command {
        Command::new("evener").subcommand(
            Command::new("up")
                .arg(Arg::new("workers").long("workers").default_value("2"))
                .arg(Arg::new("model").long("model").required(true))
                .arg(Arg::new("ask").long("ask").action(ArgAction::SetTrue)),
        )
    }

    fn parse(file: &str, args: &[&str]) -> anyhow::Result<clap::ArgMatches> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("evener.toml");
        std::fs::write(&path, file)?;
        let mut all: Vec<OsString> = vec!["evener".into(), "up".into()];
        all.extend(args.iter().map(OsString::from));
        let config: Vec<OsString> = vec!["--config".into(), path.into()];
        let matches = with_file(command(), &config)?.try_get_matches_from(all)?;
        Ok(matches.subcommand().unwrap().1.clone())
    }

    #[test]
    fn a_flag_wins_over_the_file_and_the_file_over_the_default() {
        let file = "[up]\nworkers = 3\nmodel = \"m\"\nask = true";
        let matches = parse(file, &[]).unwrap();
        assert_eq!(matches.get_one::<String>("workers").unwrap(), "3");
        assert_eq!(matches.get_one::<String>("model").unwrap(), "m");
        assert!(matches.get_flag("ask"));
        let matches = parse(file, &["--workers", "4"]).unwrap();
        assert_eq!(matches.get_one::<String>("workers").unwrap(), "4");
    }

    #[test]
    fn what_the_file_cannot_mean_is_refused_by_name() {
        let error = |file| parse(file, &[]).unwrap_err().to_string();
        assert!(error("[up]\nwrokers = 3").contains("workers, model, ask"));
        assert!(error("[down]\nworkers = 3").contains("there are: up"));
        assert!(error("[up]\nworkers = { a = 1 }").contains("`workers`"));
        assert!(error("[up").contains("not valid TOML"));
    }
}
