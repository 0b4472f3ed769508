//! Renders a conversation with the model's own chat template (Jinja, as Hugging Face runs it).
//!
//! The template comes with the model file and is not trusted: no host access, and fuel bounds its
//! time and memory. `strftime_now` is not offered, so that one request renders to one prompt on any
//! day. Called by text/mod.rs.

use std::sync::Arc;

use minijinja::value::Value;
use minijinja::{Environment, ErrorKind};

/// Steps of a render; minijinja charges one for each 64 bytes too, so this bounds memory to 128
/// MiB.
const FUEL: u64 = 2_000_000;
/// Longest source, bytes. The largest known templates are about 30 kB.
const MAX_SOURCE_BYTES: usize = 1 << 20;
const NAME: &str = "chat";

/// Who says something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    System,
    User,
    Assistant,
}

impl Role {
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
        }
    }
}

/// One turn. No `Debug`: it holds what people wrote.
#[derive(Clone)]
pub struct Message {
    pub role: Role,
    pub content: String,
    pub name: Option<String>,
}

/// Why there is no prompt.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    #[error("the model's chat template has {bytes} bytes; at most {MAX_SOURCE_BYTES} are read")]
    TooLong { bytes: usize },
    #[error("the model's chat template cannot be compiled: {reason}")]
    Uncompilable { reason: String },
    /// The template said so itself, by `raise_exception`.
    #[error("the model's chat template refuses these messages: {reason}")]
    Raised { reason: String },
    #[error(
        "rendering the chat template takes more than {FUEL} steps; send shorter messages, or the \
         whole prompt to /v1/completions"
    )]
    OutOfFuel,
    #[error("the model's chat template fails on these messages: {reason}")]
    Failed { reason: String },
}

/// A compiled template.
pub struct ChatTemplate {
    environment: Arc<Environment<'static>>,
}

impl ChatTemplate {
    /// # Errors
    /// Too long, or not Jinja.
    pub fn new(source: &str) -> Result<Self, Error> {
        if source.len() > MAX_SOURCE_BYTES {
            return Err(Error::TooLong { bytes: source.len() });
        }
        let mut environment = Environment::new();
        environment.set_fuel(Some(FUEL));
        // Hugging Face's settings.
        let mut syntax = minijinja::syntax::SyntaxConfig::builder();
        syntax.trim_blocks(true).lstrip_blocks(true);
        let syntax = syntax.build().map_err(|e| Error::Uncompilable { reason: e.to_string() })?;
        environment.set_syntax(syntax);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment
            .add_template_owned(NAME, source.to_owned())
            .map_err(|e| Error::Uncompilable { reason: brief(&e) })?;
        Ok(Self { environment: Arc::new(environment) })
    }

    /// The conversation as text that ends where the assistant's answer begins.
    ///
    /// # Errors
    /// The template refuses or fails.
    pub fn render(
        &self,
        messages: &[Message],
        bos_token: &str,
        eos_token: &str,
    ) -> Result<String, Error> {
        let messages: Vec<Value> = messages.iter().map(to_value).collect();
        let context = Value::from_pairs([
            ("messages", Value::from(messages)),
            ("add_generation_prompt", Value::from(true)),
            ("bos_token", Value::from(bos_token)),
            ("eos_token", Value::from(eos_token)),
        ]);
        let template =
            self.environment.get_template(NAME).map_err(|e| Error::Failed { reason: brief(&e) })?;
        template.render(context).map_err(|error| classify(&error))
    }
}

fn to_value(message: &Message) -> Value {
    let mut fields = vec![
        ("role", Value::from(message.role.as_str())),
        ("content", Value::from(message.content.as_str())),
    ];
    if let Some(name) = &message.name {
        fields.push(("name", Value::from(name.as_str())));
    }
    Value::from_pairs(fields)
}

/// What the template's author says in a refusal.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

fn raise_exception(reason: String) -> Result<Value, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, "raised").with_source(Raised(reason)))
}

fn classify(error: &minijinja::Error) -> Error {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(at) = cause {
        if let Some(Raised(reason)) = at.downcast_ref::<Raised>() {
            return Error::Raised { reason: reason.chars().take(200).collect() };
        }
        if let Some(inner) = at.downcast_ref::<minijinja::Error>()
            && inner.kind() == ErrorKind::OutOfFuel
        {
            return Error::OutOfFuel;
        }
        cause = at.source();
    }
    Error::Failed { reason: brief(error) }
}

/// Kind and line only: details may quote what people wrote.
fn brief(error: &minijinja::Error) -> String {
    match error.line() {
        Some(line) => format!("{} in line {line}", error.kind()),
        None => error.kind().to_string(),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::tiny;
    use super::*;

    fn message(role: Role, content: &str) -> Message {
        Message { role, content: content.to_owned(), name: None }
    }

    fn render(source: &str, messages: &[Message]) -> Result<String, Error> {
        ChatTemplate::new(source)?.render(messages, "<s>", "</s>")
    }

    #[test]
    fn conversations_render_as_with_hugging_face() {
        let messages = [message(Role::System, " be kind "), message(Role::User, "hi")];
        assert_eq!(
            render(tiny::TEMPLATE, &messages).unwrap(),
            "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n\
             <|im_start|>assistant\n"
        );
        // trim_blocks and lstrip_blocks, Python's methods, break, the names Hugging Face gives.
        let source = "{{ bos_token }}\n  {% for m in messages %}\n    {% if m.role == 'user' %}\n\
                      {{ m['content'].upper().strip() }}{{ eos_token }}\n    {% break %}\n\
                      \x20   {% endif %}\n  {% endfor %}\nend";
        assert_eq!(render(source, &messages).unwrap(), "<s>\nHI</s>\nend");
        let source = "{%- set ns = namespace(n=0) -%}{%- for m in messages -%}\
                      {%- set ns.n = ns.n + m.content|length -%}{%- endfor -%}{{ ns.n }}";
        assert_eq!(render(source, &messages).unwrap(), "11");
        assert_eq!(render("{{ strftime_now is defined }}", &messages).unwrap(), "False");
        assert_eq!(render("{{ messages[1].name is defined }}", &messages).unwrap(), "False");
    }

    #[test]
    fn hostile_templates_end_in_an_error_and_soon() {
        let messages = [message(Role::User, "secret")];
        for source in [
            "{% for i in range(1000000000) %}x{% endfor %}",
            "{% for i in range(9999) %}{% for i in range(9999) %}{% for i in range(9999) %}x\
             {% endfor %}{% endfor %}{% endfor %}",
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
            "{% set ns = namespace(x='xxxxxxxx') %}{% for i in range(60) %}\
             {% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x|length }}",
            "{{ 'x' * 1000000000000 }}",
            "{{ ('x' * 90000000) ~ ('x' * 90000000) }}",
            "{{ 1 // 0 }}",
            "{{ messages[0].content.no_such_method() }}",
            "{% include '/etc/passwd' %}",
            "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        ] {
            let started = std::time::Instant::now();
            let error = render(source, &messages).expect_err(source);
            assert!(started.elapsed().as_secs() < 10, "{source}");
            assert!(!error.to_string().contains("secret"), "{source}: {error}");
        }
        for source in ["{% if %}", "{{", &"x".repeat(MAX_SOURCE_BYTES + 1)] {
            assert!(ChatTemplate::new(source).is_err());
        }
    }

    #[test]
    fn a_template_can_refuse_in_its_own_words() {
        let error = render(tiny::TEMPLATE, &[message(Role::User, "forbidden")]).unwrap_err();
        assert!(
            matches!(&error, Error::Raised { reason } if reason.contains("this word")),
            "{error}"
        );
    }
}
