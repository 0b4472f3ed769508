//! `evener chat`: talk to a served model in the terminal, or ask once with `-p`.

use std::io::{IsTerminal, Write};

use anyhow::Context;
use clap::Args;
use serde::Serialize;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader};

use crate::client::{Client, Sampling};
use crate::signals::Signals;

const EXAMPLES: &str = "Examples:
  evener chat                                     talk to the model at 127.0.0.1:8080
  evener chat -p \"What is the capital of France?\" --temperature 0
  evener chat --url http://10.0.0.5:8080 --model llama --system \"Answer in one line.\"

With -p the exit status is 0 only if a whole answer came.";

const HELP: &str = "/help     this
/clear    forget the conversation
/system   followed by text: set the system message and start again
/quit     end (Ctrl-D does too)
Ctrl-C    stop the answer that is being written";

#[derive(Debug, Clone, Args, Serialize)]
#[serde(rename_all = "kebab-case")]
#[command(after_help = EXAMPLES)]
pub struct Options {
    /// Where the cluster listens.
    #[arg(long, env = "EVENER_URL", default_value = "http://127.0.0.1:8080")]
    url: String,
    /// Name of the model; default: the only one served.
    #[arg(long, env = "EVENER_CHAT_MODEL")]
    model: Option<String>,
    /// Ask once, print the answer and end.
    #[arg(short, long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt: Option<String>,
    /// System message.
    #[arg(long, env = "EVENER_SYSTEM")]
    system: Option<String>,
    /// 0 to 2; 0 always takes the likeliest token. Default: the server's.
    #[arg(long, env = "EVENER_TEMPERATURE")]
    temperature: Option<f32>,
    /// 0 to 1: sample from the likeliest tokens that sum up to it. Default: the server's.
    #[arg(long, env = "EVENER_TOP_P")]
    top_p: Option<f32>,
    /// Sample from the K likeliest tokens; 0 is off. Default: the server's.
    #[arg(long, env = "EVENER_TOP_K")]
    top_k: Option<u32>,
    /// The same seed gives the same answer. Default: a random one each time.
    #[arg(long, env = "EVENER_SEED")]
    seed: Option<u64>,
    /// Most tokens of an answer. Default: what the context leaves.
    #[arg(long, env = "EVENER_MAX_TOKENS")]
    max_tokens: Option<u32>,
}

pub async fn run(options: Options) -> anyhow::Result<()> {
    let client = Client::new(&options.url)?;
    let model = client.model_or_only(options.model.as_deref()).await?;
    let sampling = Sampling {
        temperature: options.temperature,
        top_p: options.top_p,
        top_k: options.top_k,
        seed: options.seed,
        max_tokens: options.max_tokens,
        ..Sampling::default()
    };
    let chat = Chat { client, model, sampling };
    match options.prompt {
        Some(prompt) => {
            let mut messages = opening(options.system.as_deref());
            messages.push(message("user", &prompt));
            chat.answer(&messages).await?;
            Ok(())
        }
        None => chat.converse(options.system).await,
    }
}

struct Chat {
    client: Client,
    model: String,
    sampling: Sampling,
}

impl Chat {
    /// Streams one answer to the terminal.
    async fn answer(&self, messages: &[Value]) -> anyhow::Result<String> {
        let messages = Value::Array(messages.to_vec());
        let answer = self.client.chat(&self.model, &messages, &self.sampling).await?;
        let mut at_line_start = true;
        let result = answer
            .collect(|piece| {
                at_line_start = piece.ends_with('\n');
                show(piece);
            })
            .await;
        if !at_line_start {
            show("\n");
        }
        let (text, finish) = result?;
        if finish == "length" {
            eprintln!("(the answer was cut at the token limit; see --max-tokens)");
        }
        Ok(text)
    }

    async fn converse(&self, mut system: Option<String>) -> anyhow::Result<()> {
        let terminal = std::io::stdin().is_terminal();
        if terminal {
            eprintln!(
                "{} at {}. /help shows the commands, Ctrl-D ends.",
                self.model,
                self.client.url()
            );
        }
        let mut signals = Signals::listen()?;
        let mut lines = BufReader::new(tokio::io::stdin()).lines();
        let mut messages = opening(system.as_deref());
        let mut failed = false;
        loop {
            if terminal {
                eprint!("> ");
            }
            let line = tokio::select! {
                line = lines.next_line() => line.context("the input cannot be read")?,
                () = signals.next() => {
                    eprintln!("\n(Ctrl-D ends)");
                    continue;
                }
            };
            let Some(line) = line else { break };
            match line.trim() {
                "" => continue,
                "/quit" | "/exit" => break,
                "/help" => eprintln!("{HELP}"),
                "/clear" => messages = opening(system.as_deref()),
                text => {
                    if let Some(text) = text.strip_prefix("/system ") {
                        system = Some(text.trim().to_owned());
                        messages = opening(system.as_deref());
                        continue;
                    }
                    if text.starts_with('/') {
                        eprintln!("there is no command {text}; /help shows those there are");
                        continue;
                    }
                    messages.push(message("user", text));
                    let outcome = tokio::select! {
                        outcome = self.answer(&messages) => outcome,
                        // Dropping the answer closes the connection; the server frees the sequence.
                        () = signals.next() => Err(anyhow::anyhow!("stopped")),
                    };
                    match outcome {
                        Ok(answer) => messages.push(message("assistant", &answer)),
                        Err(error) => {
                            eprintln!("\nerror: {error:#}");
                            messages.pop();
                            failed = true;
                        }
                    }
                }
            }
        }
        // Piped input is a script: its caller must learn that an answer is missing.
        if failed && !terminal {
            Err(anyhow::anyhow!("at least one answer failed"))
        } else {
            Ok(())
        }
    }
}

fn show(text: &str) {
    let mut out = std::io::stdout();
    // A closed pipe ends the process at its next write; nothing better can be done with a piece of
    // text.
    if out.write_all(text.as_bytes()).and_then(|()| out.flush()).is_err() {
        std::process::exit(1);
    }
}

fn opening(system: Option<&str>) -> Vec<Value> {
    system.map(|text| message("system", text)).into_iter().collect()
}

fn message(role: &str, content: &str) -> Value {
    json!({ "role": role, "content": content })
}
