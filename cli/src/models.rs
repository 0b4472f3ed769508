//! From what people type after `--model` to a file, and from the file to the name it is served
//! under.

use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow, bail};
use evener_proto::ids::ModelName;
use evener_worker::checkpoint::synthetic;

/// Directories searched for a model that is named and not given as a path: `EVENER_MODELS`
/// (separated by colons), then `.cache/models` here, where `make run` keeps the demo model.
fn directories() -> Vec<PathBuf> {
    let named = std::env::var_os("EVENER_MODELS").unwrap_or_default();
    let mut dirs: Vec<PathBuf> =
        std::env::split_paths(&named).filter(|dir| !dir.as_os_str().is_empty()).collect();
    dirs.push(PathBuf::from(".cache/models"));
    dirs
}

/// The file that `--model` means, or the name of a synthetic model as it is.
pub fn resolve(model: &str) -> anyhow::Result<PathBuf> {
    if model.starts_with(synthetic::SCHEME) {
        let spec: synthetic::Spec = model.parse()?;
        return Ok(PathBuf::from(spec.to_string()));
    }
    resolve_in(model, &directories())
}

fn resolve_in(model: &str, dirs: &[PathBuf]) -> anyhow::Result<PathBuf> {
    let path = Path::new(model);
    if path.is_file() {
        return Ok(path.to_owned());
    }
    if path.is_dir() {
        bail!("the model {model} is a directory; name a .gguf file in it");
    }
    if model.contains('/') || model.ends_with(".gguf") {
        bail!("the model file {model} does not exist; give the path of a .gguf file");
    }
    let found = listing(dirs);
    let matches: Vec<&PathBuf> = found.iter().filter(|file| is_named(file, model)).collect();
    match matches.as_slice() {
        [one] => Ok((*one).clone()),
        [] => {
            let dirs: Vec<String> = dirs.iter().map(|d| d.display().to_string()).collect();
            Err(anyhow!(
                "no model is called {model}: {} {}; give a path, or set EVENER_MODELS to the \
                 directory that holds it (`make model` fetches the demo model)",
                dirs.join(" and "),
                match found.as_slice() {
                    [] => "hold no .gguf file".to_owned(),
                    files => format!("hold {}", names(files.iter())),
                }
            ))
        }
        several => Err(anyhow!(
            "{model} could be {}; write the whole name",
            names(several.iter().copied())
        )),
    }
}

fn names<'a>(files: impl Iterator<Item = &'a PathBuf>) -> String {
    let stems: Vec<String> = files.map(|file| stem(file)).collect();
    stems.join(", ")
}

fn stem(file: &Path) -> String {
    file.file_stem().map_or_else(String::new, |stem| stem.to_string_lossy().into_owned())
}

/// Whether `name` is the file's stem, or its stem up to the quantisation (`Model` for
/// `Model.Q4_1.gguf`).
fn is_named(file: &Path, name: &str) -> bool {
    let stem = stem(file).to_lowercase();
    let name = name.to_lowercase();
    stem == name || stem.strip_prefix(&name).is_some_and(|rest| rest.starts_with('.'))
}

fn listing(dirs: &[PathBuf]) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = dirs
        .iter()
        .filter_map(|dir| std::fs::read_dir(dir).ok())
        .flatten()
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| path.extension().is_some_and(|ext| ext == "gguf") && path.is_file())
        .collect();
    files.sort();
    files.dedup_by_key(|file| stem(file));
    files
}

/// The name a file is served under: `name` if given, else the file's stem, else what says which
/// synthetic model it is.
pub fn served_name(file: &Path, name: Option<&str>) -> anyhow::Result<ModelName> {
    let synthetic = file.to_str().and_then(|name| name.strip_prefix(synthetic::SCHEME));
    let stem = synthetic.map_or_else(|| stem(file), |name| name.replace(':', "."));
    ModelName::parse(name.unwrap_or(&stem)).with_context(|| {
        format!("{} cannot be served under that name; choose one with --name", file.display())
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_name_means_the_one_file_that_carries_it() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["A.Q4_1.gguf", "A.Q8_0.gguf", "B-1.gguf", "notes.txt"] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        let dirs = [dir.path().to_owned()];
        let resolve = |name| resolve_in(name, &dirs).map_err(|error| error.to_string());
        assert_eq!(resolve("a.q4_1").unwrap(), dir.path().join("A.Q4_1.gguf"));
        assert_eq!(resolve("B-1").unwrap(), dir.path().join("B-1.gguf"));
        assert!(resolve("A").unwrap_err().contains("A.Q4_1, A.Q8_0"));
        assert!(resolve("C").unwrap_err().contains("hold A.Q4_1, A.Q8_0, B-1"));
        assert!(resolve("x/y.gguf").unwrap_err().contains("does not exist"));
    }

    #[test]
    fn a_synthetic_model_is_named_and_not_looked_for() {
        let path = super::resolve("synthetic:llama-1b:Q4_0:3").unwrap();
        assert_eq!(path, Path::new("synthetic:llama-1b:q4_0:3"));
        assert_eq!(served_name(&path, None).unwrap().as_str(), "llama-1b.q4_0.3");
        assert!(super::resolve("synthetic:llama-1b").is_err());
    }

    #[test]
    fn a_name_that_could_break_a_key_is_refused() {
        assert!(served_name(Path::new("/x/a b.gguf"), None).is_err());
        assert_eq!(served_name(Path::new("/x/a.Q4.gguf"), None).unwrap().as_str(), "a.Q4");
        assert_eq!(served_name(Path::new("/x/a b.gguf"), Some("ab")).unwrap().as_str(), "ab");
    }
}
