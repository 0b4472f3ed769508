//! Writes GGUF files (version 3) for tests: metadata, tensor table, aligned data, in memory.

/// A metadata value.
#[derive(Clone)]
pub enum Value {
    U32(u32),
    F32(f32),
    Bool(bool),
    String(String),
    Strings(Vec<String>),
    I32s(Vec<i32>),
}

/// A tensor: dimensions fastest first, as the file lists them.
#[derive(Clone)]
pub struct Tensor {
    pub name: String,
    pub dimensions: Vec<u64>,
    pub ggml_type: u32,
    pub data: Vec<u8>,
}

/// A file to be.
#[derive(Clone, Default)]
pub struct File {
    pub metadata: Vec<(String, Value)>,
    pub tensors: Vec<Tensor>,
}

/// Where the regions of a written file end.
pub struct Written {
    pub bytes: Vec<u8>,
    pub header_end: usize,
    pub metadata_end: usize,
    pub table_end: usize,
}

const ALIGNMENT: usize = 32;

impl File {
    pub fn set(&mut self, key: &str, value: Value) {
        match self.metadata.iter_mut().find(|(name, _)| name == key) {
            Some((_, old)) => *old = value,
            None => self.metadata.push((key.to_owned(), value)),
        }
    }

    pub fn remove(&mut self, key: &str) {
        self.metadata.retain(|(name, _)| name != key);
    }

    pub fn write(&self) -> Written {
        let mut bytes = Vec::new();
        bytes.extend(b"GGUF");
        bytes.extend(3u32.to_le_bytes());
        bytes.extend((self.tensors.len() as u64).to_le_bytes());
        bytes.extend((self.metadata.len() as u64).to_le_bytes());
        let header_end = bytes.len();
        for (key, value) in &self.metadata {
            put_string(&mut bytes, key);
            put_value(&mut bytes, value);
        }
        let metadata_end = bytes.len();
        let mut offset = 0;
        for tensor in &self.tensors {
            put_string(&mut bytes, &tensor.name);
            bytes.extend((tensor.dimensions.len() as u32).to_le_bytes());
            tensor.dimensions.iter().for_each(|d| bytes.extend(d.to_le_bytes()));
            bytes.extend(tensor.ggml_type.to_le_bytes());
            bytes.extend((offset as u64).to_le_bytes());
            offset = (offset + tensor.data.len()).next_multiple_of(ALIGNMENT);
        }
        let table_end = bytes.len();
        for tensor in &self.tensors {
            bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
            bytes.extend(&tensor.data);
        }
        Written { bytes, header_end, metadata_end, table_end }
    }
}

fn put_string(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}

fn put_value(bytes: &mut Vec<u8>, value: &Value) {
    let mut tag = |id: u32| bytes.extend(id.to_le_bytes());
    match value {
        Value::U32(value) => {
            tag(4);
            bytes.extend(value.to_le_bytes());
        }
        Value::F32(value) => {
            tag(6);
            bytes.extend(value.to_le_bytes());
        }
        Value::Bool(value) => {
            tag(7);
            bytes.push(u8::from(*value));
        }
        Value::String(text) => {
            tag(8);
            put_string(bytes, text);
        }
        Value::Strings(texts) => {
            [9, 8].into_iter().for_each(tag);
            bytes.extend((texts.len() as u64).to_le_bytes());
            texts.iter().for_each(|text| put_string(bytes, text));
        }
        Value::I32s(numbers) => {
            [9, 5].into_iter().for_each(tag);
            bytes.extend((numbers.len() as u64).to_le_bytes());
            numbers.iter().for_each(|number| bytes.extend(number.to_le_bytes()));
        }
    }
}
