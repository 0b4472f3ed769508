//! `evener doctor`: what this machine offers, and what that means for a worker. Starts nothing.

use clap::Args;
use evener_worker::host::probe::{self, Found};
use evener_worker::{host, metrics};
use serde::Serialize;

use crate::values::{Bytes, Device};

const EXAMPLES: &str = "Examples:
  evener doctor
  evener doctor --device cuda:0 && evener up --device cuda:0 --model model.gguf";

/// Width of the words before the facts.
const MARGIN: usize = 12;

#[derive(Debug, Clone, Args, Serialize)]
#[serde(rename_all = "kebab-case")]
#[command(after_help = EXAMPLES)]
pub struct Options {
    /// Fail, with a sentence, unless a worker could use this device: cpu, cuda:N or auto.
    #[arg(long, env = "EVENER_DEVICE", value_name = "DEVICE", default_value_t = Device::Auto)]
    pub device: Device,
}

pub fn run(options: &Options) -> anyhow::Result<()> {
    let found = probe::look();
    for Line { of, says } in machine().into_iter().chain(cards(&found)) {
        println!("{of:<MARGIN$}{says}");
    }
    match options.device {
        Device::Cpu | Device::Auto => Ok(()),
        Device::Cuda(ordinal) => usable(&found, ordinal),
    }
}

/// Whether a worker could use a card, as far as can be seen without starting it.
fn usable(found: &Found, ordinal: usize) -> anyhow::Result<()> {
    let n_cards = found.cards.as_ref().map_err(Clone::clone)?.len();
    if ordinal >= n_cards {
        return Err(probe::Error::NoCard { ordinal, n_cards }.into());
    }
    Ok(())
}

/// A fact or what follows from it.
#[derive(Debug, PartialEq, Eq)]
struct Line {
    of: &'static str,
    says: String,
}

fn line(of: &'static str, says: impl Into<String>) -> Line {
    Line { of, says: says.into() }
}

fn machine() -> Vec<Line> {
    let n_cores = host::cores().len();
    let [total, available] = [metrics::total_memory_bytes(), metrics::available_memory_bytes()]
        .map(|bytes| bytes.map_or_else(|| "unknown".to_owned(), |n| Bytes(n).to_string()));
    let cores = if n_cores == 1 { "core" } else { "cores" };
    vec![
        line("processor", format!("{}, {n_cores} {cores} for this process", host::processor())),
        line("", format!("kernels for {}", host::instruction_set())),
        line("memory", format!("{total}, of which {available} can be had")),
        line("huge pages", huge_pages(host::huge_pages().as_deref())),
    ]
}

fn huge_pages(chosen: Option<&str>) -> String {
    match chosen {
        Some("never") => "never: weights are read through small pages, some percent slower; as \
                          root, write madvise to /sys/kernel/mm/transparent_hugepage/enabled"
            .to_owned(),
        Some(chosen) => format!("{chosen}: weights lie in huge pages"),
        None => "the system does not say".to_owned(),
    }
}

/// What there is of CUDA, and what is missing for `--device cuda:0`.
fn cards(found: &Found) -> Vec<Line> {
    let version = |(major, minor): (i32, i32)| format!("{major}.{minor}");
    let cards = match &found.cards {
        Err(error) => return vec![line("cards", error.to_string())],
        Ok(cards) => cards,
    };
    let mut lines: Vec<Line> = (0..)
        .zip(cards)
        .map(|(ordinal, card): (usize, _)| {
            let (memory, n) = (Bytes(card.memory_bytes), card.n_multiprocessors);
            let about =
                format!("{}, {memory}, {}, {n} multiprocessors", card.name, card.arch.name());
            line(if ordinal == 0 { "cards" } else { "" }, format!("cuda:{ordinal}: {about}"))
        })
        .collect();
    let driver = found.driver.map_or_else(|| "of unknown version".to_owned(), version);
    lines.push(line("driver", format!("runs CUDA {driver}")));
    lines.push(match found.compiler {
        Some(found) => line("nvrtc", format!("{}: compiles the kernels", version(found))),
        None => line(
            "nvrtc",
            "not found: only kernels that were compiled before can be used; install NVRTC 13 (pip: \
             nvidia-cuda-nvrtc) or name its directory in EVENER_NVRTC",
        ),
    });
    lines.push(match found.has_cublas {
        true => line("cublasLt", "found: multiplies many tokens with bf16 weights"),
        false => line("cublasLt", "not found: Evener's own kernels multiply many tokens, slower"),
    });
    lines.push(match found.nccl {
        Some((major, minor, patch)) => {
            line("nccl", format!("{major}.{minor}.{patch}: ranks on cards of their own sum by it"))
        }
        None => line(
            "nccl",
            "not found as libnccl.so: ranks on cards sum through the host's memory; a link of that \
             name to libnccl.so.2, where the loader looks, would do",
        ),
    });
    lines.push(line(
        "",
        "kernels have run on an H200, but for their last changes; for other cards they are compiled, \
         and tested by emulation. Sums by NCCL have run on none: --transport shm or tcp does without",
    ));
    lines
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use evener_worker::host::probe::Card;

    #[test]
    fn what_is_missing_comes_with_what_would_help() {
        let check = |found: Found, expect: &[&str]| {
            let text: Vec<String> =
                cards(&found).into_iter().map(|l| format!("{} {}", l.of, l.says)).collect();
            let text = text.join("\n");
            for part in expect {
                assert!(text.contains(part), "`{part}` is not in:\n{text}");
            }
        };
        let nothing = Found {
            cards: Err(probe::Error::NoDriver),
            driver: None,
            compiler: None,
            has_cublas: false,
            nccl: None,
        };
        check(nothing.clone(), &["cards there is no NVIDIA driver", "--device cpu"]);
        let card = Card {
            name: "A card".to_owned(),
            arch: probe::Arch { major: 9, minor: 0 },
            memory_bytes: 80 << 30,
            n_multiprocessors: 132,
        };
        let found = Found { cards: Ok(vec![card.clone(), card]), driver: Some((13, 0)), ..nothing };
        check(
            found.clone(),
            &["cuda:1: A card, 80.0 GiB, sm_90", "nvidia-cuda-nvrtc", "through the host's memory"],
        );
        let all =
            Found { compiler: Some((13, 0)), has_cublas: true, nccl: Some((2, 30, 7)), ..found };
        check(all, &["runs CUDA 13.0", "13.0: compiles", "nccl 2.30.7", "have run on an H200"]);
    }

    #[test]
    fn a_card_that_is_not_there_is_not_usable() {
        let found = Found {
            cards: Ok(Vec::new()),
            driver: Some((13, 0)),
            compiler: None,
            has_cublas: false,
            nccl: None,
        };
        let error = usable(&found, 1).unwrap_err().to_string();
        assert_eq!(error, "cuda:1 is not there: the driver sees 0 cards");
        let found = Found { cards: Err(probe::Error::NoDriver), ..found };
        assert!(usable(&found, 0).unwrap_err().to_string().contains("no NVIDIA driver"));
    }

    #[test]
    fn huge_pages_that_are_off_are_told_how_to_be_had() {
        assert!(huge_pages(Some("never")).contains("write madvise"));
        assert_eq!(huge_pages(Some("madvise")), "madvise: weights lie in huge pages");
    }
}
