// {{name}}: text -> embedding, written from manifest.json. Not compiled where it was written; check it with selftest.json.
// Gradle: what Model.kt names; and for tokenizer.json, both of one version,
// implementation("ai.djl.huggingface:tokenizers:0.33.0") and runtimeOnly("ai.djl.android:tokenizer-native:0.33.0").
import ai.djl.huggingface.tokenizers.HuggingFaceTokenizer
import android.content.Context
import kotlin.math.sqrt

class Encoder(context: Context) : AutoCloseable {
    private val prefix = longArrayOf({{prefix}})
    private val suffix = longArrayOf({{suffix}})
    private val maxLength = {{max_length}}
    private val dimensions = {{dimensions}}
    private val normalize = {{normalize}}
    private val model = Model(context)
    private val tokenizer = context.assets.open("{{tokenizer}}").use { HuggingFaceTokenizer.newInstance(it, emptyMap()) }

    /** The ids of a text: special ones before and after as many of its own as there is room for. */
    fun encode(text: String): LongArray {
        val own = tokenizer.encode(text, false, false).ids
        return prefix + own.take(maxLength - prefix.size - suffix.size) + suffix
    }

    /** The embedding of a text, `dimensions` values. */
    fun embed(text: String): FloatArray {
        val ids = encode(text)
        val given = mapOf("input_ids" to ids, "attention_mask" to LongArray(ids.size) { 1 })
        val values = model.run(given, "{{output}}") // of all tokens, one after the other
        val found = {{pooled_kotlin}}
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
