//! Writes the head of a GGUF file, version 3: metadata and tensor table. The data are `pattern`'s.

use evener_kernels::quant::Format;

/// Of every tensor's data: a page, so that data can be mapped piece by piece.
pub(super) const ALIGNMENT: usize = 4096;

/// A tensor of the file to be.
#[derive(Debug, Clone)]
pub(super) struct Tensor {
    name: String,
    pub(super) format: Format,
    /// Rows, columns; one row for a vector.
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) is_vector: bool,
    /// Matrices of as many rows below each other.
    n_stacked: usize,
}

impl Tensor {
    pub(super) fn matrix(stem: String, format: Format, rows: usize, columns: usize) -> Self {
        Self { name: stem + ".weight", format, rows, columns, is_vector: false, n_stacked: 1 }
    }

    /// `rows`: of all `n` matrices.
    pub(super) fn stack(
        stem: String,
        format: Format,
        n: usize,
        rows: usize,
        columns: usize,
    ) -> Self {
        Self { n_stacked: n, ..Self::matrix(stem, format, rows, columns) }
    }

    pub(super) fn vector(stem: String, columns: usize) -> Self {
        let format = Format::F32;
        Self { name: stem + ".weight", format, rows: 1, columns, is_vector: true, n_stacked: 1 }
    }

    pub(super) fn n_bytes(&self) -> usize {
        self.rows * (self.columns / self.format.block_len()) * self.format.block_bytes()
    }
}

/// Metadata, entry by entry, in the order they are put.
#[derive(Debug, Default)]
pub(super) struct Writer {
    entries: Vec<u8>,
    n_entries: u64,
}

impl Writer {
    pub(super) fn string(&mut self, key: &str, text: &str) {
        self.key(key, 8);
        put_string(&mut self.entries, text);
    }

    pub(super) fn u32(&mut self, key: &str, value: u32) {
        self.key(key, 4);
        self.entries.extend(value.to_le_bytes());
    }

    pub(super) fn f32(&mut self, key: &str, value: f32) {
        self.key(key, 6);
        self.entries.extend(value.to_le_bytes());
    }

    pub(super) fn bool(&mut self, key: &str, value: bool) {
        self.key(key, 7);
        self.entries.push(value.into());
    }

    pub(super) fn strings(&mut self, key: &str, texts: &[String]) {
        self.array(key, 8, texts.len());
        texts.iter().for_each(|text| put_string(&mut self.entries, text));
    }

    pub(super) fn i32s(&mut self, key: &str, values: &[i32]) {
        self.array(key, 5, values.len());
        values.iter().for_each(|value| self.entries.extend(value.to_le_bytes()));
    }

    fn key(&mut self, key: &str, value_type: u32) {
        self.n_entries += 1;
        put_string(&mut self.entries, key);
        self.entries.extend(value_type.to_le_bytes());
    }

    fn array(&mut self, key: &str, of: u32, len: usize) {
        self.key(key, 9);
        self.entries.extend(of.to_le_bytes());
        self.entries.extend((len as u64).to_le_bytes());
    }

    /// The head of the file, up to where the first tensor's data begin.
    pub(super) fn finish(self, tensors: &[Tensor]) -> Vec<u8> {
        let mut head = b"GGUF".to_vec();
        head.extend(3u32.to_le_bytes());
        head.extend((tensors.len() as u64).to_le_bytes());
        head.extend(self.n_entries.to_le_bytes());
        head.extend(self.entries);
        let mut offset = 0;
        for tensor in tensors {
            put_string(&mut head, &tensor.name);
            let Tensor { rows, columns, n_stacked, .. } = *tensor;
            let dimensions: &[usize] = match (tensor.is_vector, n_stacked) {
                (true, _) => &[columns],
                (false, 1) => &[columns, rows],
                (false, n) => &[columns, rows / n, n],
            };
            head.extend((dimensions.len() as u32).to_le_bytes());
            dimensions.iter().for_each(|&d| head.extend((d as u64).to_le_bytes()));
            let id = tensor.format.ggml_id().expect("a format of files");
            head.extend(id.to_le_bytes());
            head.extend((offset as u64).to_le_bytes());
            offset += tensor.n_bytes().next_multiple_of(ALIGNMENT);
        }
        head.resize(head.len().next_multiple_of(ALIGNMENT), 0);
        head
    }
}

fn put_string(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}
