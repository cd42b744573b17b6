// {{ name }}: text -> embedding, written from manifest.json. Not compiled where it was written; check it with selftest.json.
// Gradle: what Model.kt names; and for tokenizer.json, both of one version,
// implementation("ai.djl.huggingface:tokenizers:0.33.0") and runtimeOnly("ai.djl.android:tokenizer-native:0.33.0").
import ai.djl.huggingface.tokenizers.HuggingFaceTokenizer
import android.content.Context
import kotlin.math.sqrt

class Encoder(context: Context) : AutoCloseable {
    private val prefix = longArrayOf({{ rule.prefix_ids | join(", ") }})
    private val suffix = longArrayOf({{ rule.suffix_ids | join(", ") }})
    private val maxLength = {{ rule.max_length }}
    private val dimensions = {{ end.dimensions }}
    private val normalize = {{ end.normalize | lower }}
    private val model = Model(context)
    private val tokenizer = context.assets.open("{{ rule.tokenizer }}").use { HuggingFaceTokenizer.newInstance(it, emptyMap()) }

    /** The ids of a text: special ones before and after as many of its own as there is room for. */
    fun encode(text: String): LongArray {
        val own = tokenizer.encode(text, false, false).ids
        return prefix + own.take(maxLength - prefix.size - suffix.size) + suffix
    }

    /** The embedding of a text, `dimensions` values. */
    fun embed(text: String): FloatArray {
        val ids = encode(text)
        val given = mapOf("input_ids" to ids, "attention_mask" to LongArray(ids.size) { 1 })
        val values = model.run(given, "{{ end.output }}") // of all tokens, one after the other
        val found = {% if end.pooling == "mean" -%}
            FloatArray(dimensions) { at -> (at until values.size step dimensions).map { values[it] }.average().toFloat() }
        {%- elif end.pooling == "cls" -%}
            values.copyOf(dimensions)
        {%- elif end.pooling == "max" -%}
            FloatArray(dimensions) { at -> (at until values.size step dimensions).maxOf { values[it] } }
        {%- elif end.pooling == "lasttoken" -%}
            values.copyOfRange(values.size - dimensions, values.size)
        {%- else -%}
            values
        {%- endif +%}
        val length = if (normalize) norm(found) else 1.0
        return FloatArray(dimensions) { (found[it] / length).toFloat() }
    }

    /** Sentence to the cosine of its embedding to the question's, the nearest first. */
    fun nearest(question: String, sentences: List<String>): List<Pair<String, Double>> {
        val asked = embed(question)
        return sentences.map { it to cosine(asked, embed(it)) }.sortedByDescending { it.second }
    }

    fun cosine(one: FloatArray, other: FloatArray): Double =
        one.indices.sumOf { one[it].toDouble() * other[it] } / (norm(one) * norm(other))

    private fun norm(values: FloatArray): Double = sqrt(values.sumOf { it.toDouble() * it })

    override fun close() {
        model.close()
        tokenizer.close()
    }
}
